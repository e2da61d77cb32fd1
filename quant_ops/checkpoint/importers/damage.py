"""Codes and scales that cannot be what a layer's JSON and shapes say they are.

Each check takes a layer and its translation, and gives what it found. A layer with `sample` set is
looked at in samples of its codes and in its small tensors: a glance, which takes milliseconds for
the largest file. Without, everything is read, and nothing else is found in a small file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ....kernels.packing import unpack_nibbles
from ...formats import get_format
from ...formats.bnb_4bit import Bnb4Bit
from ...formats.convrot_w4a4 import ConvRotW4A4
from ..scales import SCALES, scale_problem
from .base import FP8, FP8_SCALES, StoredLayer, Tensors, Translation
from .scaled import levels_of, lost_its_scale

Found = Iterable[str]
# Bytes of a tensor that is read at a glance: a number per row takes 48 KB for 12,288 rows.
SMALL = 1 << 18
# The usual weight of a layer: trained ones lie between 1e-3 and 1, embeddings reach some tens.
LARGEST = 100.0
TINY = 2.0**-100  # a scale below it makes zeros of any code
# Usual code where no sample is needed: half of what 4 bits reach, a third of 8 bits.
USUAL = {"absmax": 0.4, "weight_s_channel": 40.0}
# Share of nibbles that are -8: codes from -7 to 7 have none, bytes of INT8 one in 16.
NEVER, ALWAYS = 0.0, 0.01
VARIED = 12  # high nibbles that occur in bytes of two codes each, or of INT8 codes of all sizes
ENOUGH = 1024  # bytes that show it


def lost_scale(layer: StoredLayer, made: Translation) -> Found:
    if lost_its_scale(layer):
        yield f"largest code of {layer.weight.dtype}"


def nan_codes(layer: StoredLayer, made: Translation) -> Found:
    if layer.weight.dtype in FP8:
        nan = int(layer.sampled(layer.codes).isnan().sum())
        if nan:
            yield f"{nan} codes"


def broken_scales(layer: StoredLayer, made: Translation) -> Found:
    scales = _scales(layer)
    weight = {"weight": layer.sampled(layer.codes)} if scales else {}
    problem = scale_problem({**scales, **weight})
    if problem:
        yield problem


def zero_scales(layer: StoredLayer, made: Translation) -> Found:
    """Scales of zero whose codes are not. An empty group of bitsandbytes may have any code, the
    same throughout.
    """
    tiny = any(bool((scale < TINY).any()) for scale in _multipliers(layer).values())
    if made.format is None or not tiny:
        return
    stored = {suffix: layer.read(suffix) for suffix in layer.specs}
    if scale_problem(stored):
        return  # told by broken_scales
    canonical = made.convert(stored)
    for suffix, scale in canonical.items():
        if SCALES.get(suffix) is not False or scale.dtype != torch.float32:
            continue
        zero = scale < TINY
        if bool(zero.any()) and _matters(made, canonical, suffix, zero):
            yield f"{suffix}: {int(zero.sum())} of {scale.numel()} are zero, their codes are not"


def _matters(made: Translation, canonical: Tensors, suffix: str, zero: torch.Tensor) -> bool:
    """Whether the layer would have other weights with other scales in these places."""
    scale = canonical[suffix]
    filled = made.weight({**canonical, suffix: scale.masked_fill(zero, 1.0)})
    change = (filled - made.weight({**canonical, suffix: scale.masked_fill(zero, 0.0)})).reshape(-1)
    if not isinstance(get_format(made.format), Bnb4Bit):
        return bool(change.any())
    size = made.options.block_size
    groups = torch.nn.functional.pad(change, (0, -len(change) % size)).view(-1, size)
    return bool((groups[:, 1:] != groups[:, :-1])[: len(change) // size].any())


def implausible_scale(layer: StoredLayer, made: Translation) -> Found:
    size = _usual_weight(layer, made)
    if size is not None and size > LARGEST:
        yield f"about {size:.3g}"


def _usual_weight(layer: StoredLayer, made: Translation) -> float | None:
    """Root mean square of the weights, roughly; None where a glance does not tell."""
    scales = _multipliers(layer)
    packed = layer.weight.dtype == "U8" and "weight_scale" in layer.specs
    if "weight_scale_2" in scales and packed:
        blocks = layer.sampled("weight_scale").view(torch.float8_e4m3fn).float()
        return 3 * _rms(blocks[blocks.isfinite()]) * _middle(scales["weight_scale_2"])
    for suffix, code in USUAL.items():
        if suffix in scales:
            return code * _middle(scales[suffix])
    suffix = next((each for each in FP8_SCALES if each in scales), None)
    if suffix is None or layer.weight.dtype not in (*FP8, "I8"):
        return None
    codes = layer.sampled(layer.codes)
    if made.format == ConvRotW4A4.name:
        return 3 * _middle(scales[suffix])
    values = levels_of(codes.dtype).widen(codes)
    return _rms(values[values.isfinite()]) * _middle(scales[suffix])


def other_width(layer: StoredLayer, made: Translation) -> Found:
    """Two codes a byte read as one, or the other way round."""
    if layer.weight.dtype != "I8" or made.format is None or "weight_scale" not in layer.specs:
        return
    sample = layer.sampled(layer.codes).view(torch.uint8)
    if sample.numel() < ENOUGH:
        return
    nibbles = unpack_nibbles(sample.reshape(1, -1), high_first=False)
    share = float((nibbles == 8).float().mean())
    if made.format == ConvRotW4A4.name and share > ALWAYS:
        yield f"{share:.0%} of the 4-bit codes are -8, which is none: each byte is one code"
    bytes_of_two = share == NEVER and len((sample >> 4).unique()) >= VARIED
    if made.format.startswith("int8") and bytes_of_two:
        yield "no byte has a nibble of 8, as codes of 8 bits have: each byte is two codes of 4"


# What makes a layer unreadable, in the order of evidence, and how an error says it.
FATAL: dict[Callable[[StoredLayer, Translation], Found], str] = {
    lost_scale: "the codes fill their range and there is no scale: it was lost ({})",
    nan_codes: "{} are no numbers",
    broken_scales: "{}",
    zero_scales: "{}",
    implausible_scale: "its weights would be {}, larger than any model's",
    other_width: "{}",
}


def damage(layer: StoredLayer, made: Translation) -> str | None:
    """The first thing that makes a layer unreadable."""
    for check, text in FATAL.items():
        what = next(iter(check(layer, made)), None)
        if what is not None:
            return text.format(what)
    return None


def _scales(layer: StoredLayer) -> Tensors:
    return {suffix: layer.read(suffix) for suffix in layer.specs if _is_scale(layer, suffix)}


def _is_scale(layer: StoredLayer, suffix: str) -> bool:
    named = suffix.rpartition(".")[2] in SCALES
    return named and (layer.sample is None or layer.specs[suffix].nbytes <= SMALL)


def _multipliers(layer: StoredLayer) -> Tensors:
    """Scales that are numbers of 16 bits or more, above zero."""
    return {
        suffix: scale.float()
        for suffix, scale in _scales(layer).items()
        if not SCALES[suffix.rpartition(".")[2]]
        and scale.is_floating_point()
        and scale.itemsize > 1
        and scale.numel()
    }


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _middle(values: torch.Tensor) -> float:
    return float(values.median())
