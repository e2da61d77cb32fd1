"""Mistakes that the values of one layer show, without the original."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...formats import FORMATS
from ..importers import StoredLayer, Translation
from ..importers.base import FP8, FP8_SCALES, Tensors
from ..importers.bitsandbytes import LOW_NIBBLE
from ..importers.scaled import lost_its_scale
from ..scales import SCALES as SCALE_NAMES
from ..scales import scale_problem
from .findings import ORIGINAL, REPAIR, Finding, Mistake, findings_of

# Codes reach 127 or 448, weights of models at most some hundreds: their scales stay below 10.
LARGEST_SCALE = 256.0
# Bytes of scales that are read at a glance: one number per row is 48 KB for 12,288 rows.
SMALL = 1 << 18


def _swapped(layer: StoredLayer, stored: Tensors, made: Translation) -> Iterable[str]:
    if made.dialect == LOW_NIBBLE:
        yield made.note


def _nan_codes(layer: StoredLayer, stored: Tensors, made: Translation) -> Iterable[str]:
    if layer.weight.dtype in FP8:
        nan = int(stored[layer.codes].isnan().sum())
        if nan:
            yield f"{nan} codes"


def _lost_scale(layer: StoredLayer, stored: Tensors, made: Translation) -> Iterable[str]:
    if lost_its_scale(layer):
        yield f"largest code of {layer.weight.dtype}"


def _lowest_code(layer: StoredLayer, stored: Tensors, made: Translation) -> Iterable[str]:
    format = FORMATS.get(made.format)
    if format is None or format.unused_code is None:
        return
    lowest = int(
        (format.codes({**stored, "weight": stored[layer.codes]}) == format.unused_code).sum()
    )
    if lowest:
        yield f"{lowest} codes are {format.unused_code}"


def _broken_scales(canonical: Tensors, stored: Tensors) -> Iterable[str]:
    problem = scale_problem(stored)
    if problem:
        yield problem
        return
    scale = canonical.get("weight_scale_2", canonical.get("weight_scale", canonical.get("absmax")))
    if scale is not None and scale.is_floating_point() and scale.itemsize > 1:
        broken = int((~torch.isfinite(scale) | (scale < 0)).sum())
        if broken:
            yield f"{broken} scales are NaN, infinite or negative"


def _implausible_scale(canonical: Tensors, stored: Tensors) -> Iterable[str]:
    scale = canonical.get("weight_scale")
    if scale is not None and scale.is_floating_point() and scale.itemsize > 1 and scale.numel():
        usual = float(scale.float().median())
        if usual > LARGEST_SCALE:
            yield f"{usual:.3g}"


SCALE_LOST = Mistake(
    "scale-lost",
    "FP8 codes that fill their range but have no scale: it was probably lost",
    ORIGINAL,
    _lost_scale,
)
NIBBLES_SWAPPED = Mistake(
    "nibbles-swapped", "the low nibble comes first under bitsandbytes' names", REPAIR, _swapped
)

CODES = (
    NIBBLES_SWAPPED,
    Mistake("nan-codes", "NaN codes in FP8", ORIGINAL, _nan_codes),
    SCALE_LOST,
    Mistake(
        "lowest-code",
        "the smallest code, which has no positive counterpart, is used",
        ORIGINAL,
        _lowest_code,
    ),
)
SCALE_BROKEN = Mistake(
    "scale-not-finite", "a scale that is no positive number", ORIGINAL, _broken_scales
)
SCALES = (
    SCALE_BROKEN,
    Mistake(
        "scale-implausible",
        "weights would be larger than any model's: the scale may be a reciprocal",
        ORIGINAL,
        _implausible_scale,
    ),
)


def glance_findings(layer: StoredLayer) -> list[Finding]:
    """What samples of the codes and all small scales show: of what `code_findings` and
    `scale_findings` find, that which takes no reading of weights.
    """
    found = SCALE_LOST.findings(layer.name, layer, {}, None)
    scales = {
        suffix: layer.read(suffix) for suffix in layer.specs if _is_small_scale(layer, suffix)
    }
    broken = stored_scale_findings(layer, scales)
    plain = layer.first(*FP8_SCALES)
    if broken or plain not in scales or layer.weight.dtype not in (*FP8, "I8"):
        return found + broken
    return found + scale_findings(layer, {"weight_scale": scales[plain]})


def _is_small_scale(layer: StoredLayer, suffix: str) -> bool:
    return suffix.rpartition(".")[2] in SCALE_NAMES and layer.specs[suffix].nbytes <= SMALL


def code_findings(layer: StoredLayer, stored: Tensors, made: Translation) -> list[Finding]:
    """What the codes show as they are stored."""
    return findings_of(CODES, layer.name, layer, stored, made)


def stored_scale_findings(layer: StoredLayer, stored: Tensors) -> list[Finding]:
    """What the scales show as they are stored."""
    return SCALE_BROKEN.findings(layer.name, {}, stored)


def scale_findings(layer: StoredLayer, canonical: Tensors) -> list[Finding]:
    """What the scales show in canonical form."""
    return findings_of(SCALES, layer.name, canonical, {})
