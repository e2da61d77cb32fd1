"""Mistakes that the values of one layer show, without the original."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...formats import FORMATS
from ..importers import StoredLayer, Translation
from ..importers.base import FP8, Tensors
from ..importers.bitsandbytes import LOW_NIBBLE
from ..importers.scaled import is_saturated
from .findings import ORIGINAL, REPAIR, Finding, Mistake


def _swapped(
    layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors
) -> Iterable[str]:
    if made.dialect == LOW_NIBBLE:
        yield made.note


def _nan_codes(
    layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors
) -> Iterable[str]:
    if layer.weight.dtype in FP8:
        nan = int(stored["weight"].isnan().sum())
        if nan:
            yield f"{nan} codes"


def _lost_scale(
    layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors
) -> Iterable[str]:
    unscaled = layer.first("weight_scale", "scale_weight") is None
    if layer.weight.dtype in FP8 and unscaled and is_saturated(stored["weight"]):
        yield f"largest code of {layer.weight.dtype}"


def _lowest_code(
    layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors
) -> Iterable[str]:
    format = FORMATS.get(made.format)
    if format is None or format.unused_code is None:
        return
    lowest = int((format.codes(stored) == format.unused_code).sum())
    if lowest:
        yield f"{lowest} codes are {format.unused_code}"


def _broken_scales(
    layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors
) -> Iterable[str]:
    scale = canonical.get("weight_scale_2", canonical.get("weight_scale", canonical.get("absmax")))
    if scale is not None and scale.dtype == torch.float32:
        broken = int((~torch.isfinite(scale) | (scale < 0)).sum())
        if broken:
            yield f"{broken} scales are NaN, infinite or negative"


SCALE_LOST = Mistake(
    "scale-lost",
    "FP8 codes that fill their range but have no scale: it was probably lost",
    ORIGINAL,
    _lost_scale,
)
NIBBLES_SWAPPED = Mistake(
    "nibbles-swapped", "the low nibble comes first under bitsandbytes' names", REPAIR, _swapped
)

VALUES = (
    NIBBLES_SWAPPED,
    Mistake("nan-codes", "NaN codes in FP8", ORIGINAL, _nan_codes),
    SCALE_LOST,
    Mistake(
        "lowest-code",
        "the smallest code, which has no positive counterpart, is used",
        ORIGINAL,
        _lowest_code,
    ),
    Mistake("scale-not-finite", "a scale that is no positive number", ORIGINAL, _broken_scales),
)


def value_findings(
    layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors
) -> list[Finding]:
    arguments = (layer, stored, made, canonical)
    return [finding for mistake in VALUES for finding in mistake.findings(layer.name, *arguments)]
