"""FP8 or INT8 codes beside one scale tensor: what seven dialects have in common; the label comes
from the shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ....kernels.grids import decode
from ....kernels.levels import Levels
from ...errors import CheckpointError
from ...formats import Arrangement, get_format
from ...formats.base import PRECISE
from ...formats.convrot import stored_group
from ...sources import DTYPE_NAMES
from ...spec import FLOAT_DTYPES, LayerInput
from ..labels import Label, label_of, labels
from .base import FP8, FP8_SCALES, StoredLayer, Tensors, Translation, floating, quantized, resolved

UNSCALED = "no scale: assumed 1.0"
# What shows in a part of any layer whose largest code is 448, unless that is 4,000 times the usual
# one (a normal sample of 65,536 reaches 4.3 times its deviation). Plain casts of weights stay below
# in most layers, of which nothing more is read then.
LARGE = 0.5
PLAIN = ("weight_scale", "scale_weight")
# What multiplies codes, in files of any tool: a layer has one of them.
RIVALS = (
    *PLAIN, "weight_scale_2", "weight_scale_inv", "weight._scale", "SCB", "absmax",
    "weight.absmax", "weight_s_rel", "weight_s_channel", "weight_zeros", "weight_global_scale",
    "weight_correction",
)  # fmt: skip


@dataclass(frozen=True)
class ScaleOf:
    """Where a layer's scales stand, and how they are read: as many numbers."""

    suffix: str
    read: Callable[[Tensors], torch.Tensor]


def translate_scaled(
    dialect: str,
    layer: StoredLayer,
    note: str,
    *,
    tag: str = "",
    precise: bool = False,
    convrot: int | None = None,
    scale: ScaleOf | None = None,
    asked: tuple[str, ...] = (),
) -> Translation:
    """`weight` and `weight_scale` (or `scale_weight`, or for FP8 none: 1.0) -> the format that
    their shapes mean.

    Args:
        tag: the format that the layer's JSON names, for the one case that shapes leave open.
        convrot: rotation group of the codes, None for unrotated ones.
        scale: scales under another name.
        asked: the user's options that decided.

    Raises:
        CheckpointError: no format holds this arrangement, or a rotated layer without one scale per
            row; and while converting, FP8 codes that fill their range and have no scale.
    """
    scale = scale or _scale_of(layer)
    suffix = scale.suffix if scale else None
    refuse_rivals(layer, suffix)
    if suffix is None:
        if layer.weight.dtype == "I8":
            raise CheckpointError(
                "INT8 codes without a scale; the model is lost without the original"
            )
        note = f"{note}; {UNSCALED}" if note else UNSCALED
    scale_shape = layer.specs[suffix].shape if suffix else ()
    if suffix and layer.specs[suffix].dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{suffix} is {layer.specs[suffix].dtype}, a scale is F32 (BF16, F16 and F64 are "
            "widened or rounded); start from the original model"
        )
    if len(layer.weight.shape) != 2:
        return _odd_rank(dialect, layer, scale, note)
    label = label_of(
        layer.weight.dtype, layer.matrix, scale_shape, tag, group_size=layer.said.get("group_size")
    )
    options = resolved(label.format, {**label.options, PRECISE: precise})
    source = LayerInput(layer.matrix, None)
    if convrot is not None:
        if not rotates(label.format):
            raise CheckpointError(f"its JSON says rotated (convrot), and {label.format} never is")
        if label.geometry is not Arrangement.ROW:
            raise CheckpointError(
                f"weight_scale is {list(scale_shape)}; rotated codes (convrot) need one scale per "
                f"row, as ({source.shape[0]}, 1)"
            )
        group = stored_group({"convrot_groupsize": convrot}, source)
        options = replace(options, convrot=True, convrot_groupsize=group)
    elif label.geometry is Arrangement.ROW and rotates(label.format) and _is_of_others(tag, layer):
        raise CheckpointError(
            f"its JSON is that of {tag}, and the codes are {layer.weight.dtype}: whether they are "
            "rotated is not said; start from the original model"
        )
    if tag and tag != label.format:
        note = f"{note}; {tag} -> {label.format}"
    if options is None:
        note = f"{note}; blocks of {label.size} are not written by any format: decoded"
        codes = layer.codes
        return floating(
            dialect,
            layer,
            layer.matrix,
            lambda t: _decode(t[codes], scale.read(t), label),
            note=note,
        )

    def rename(tensors: Tensors) -> Tensors:
        codes = tensors[layer.codes]
        if scale is None:
            _refuse_lost_scale(layer, codes)
        return {"weight": codes, "weight_scale": scale.read(tensors) if scale else torch.ones(())}

    return quantized(
        dialect,
        layer,
        label.format,
        source,
        options=options,
        convert=rename,
        note=note,
        asked=asked,
    )


def _is_of_others(tag: str, layer: StoredLayer) -> bool:
    """Whether the JSON names a format that has codes of another type."""
    return bool(tag) and get_format(tag).code_dtype != layer.weight.dtype


def _scale_of(layer: StoredLayer) -> ScaleOf | None:
    """
    Raises:
        CheckpointError: two scales that differ.
    """
    found = [suffix for suffix in PLAIN if suffix in layer.specs]
    if not found:
        return None
    suffix = found[0]
    if len(found) > 1:
        first, second = (layer.read(each).float() for each in found)
        if first.numel() != second.numel() or not torch.equal(first.view(-1), second.view(-1)):
            raise CheckpointError(
                "weight_scale and scale_weight differ: which of them counts is not said; start "
                "from the original model"
            )
    return ScaleOf(suffix, lambda tensors: tensors[suffix])


def refuse_rivals(layer: StoredLayer, chosen: str | None) -> None:
    """Of a layer whose JSON names its format, ComfyUI reads that format's tensors and no others.

    Raises:
        CheckpointError: without JSON, scales of another tool beside those that were chosen.
    """
    if layer.said.get("format"):
        return
    own = PLAIN if chosen in PLAIN else (chosen,)
    others = [suffix for suffix in RIVALS if suffix in layer.specs and suffix not in own]
    if others:
        beside = chosen or f"{layer.weight.dtype} codes"
        raise CheckpointError(
            f"{others[0]} beside {beside}: what it does there is not said; start from the original "
            "model"
        )


def _refuse_lost_scale(layer: StoredLayer, codes: torch.Tensor) -> None:
    """Codes that were scaled fill their range; a plain cast would not."""
    if is_saturated(codes):
        raise CheckpointError(
            f"layer '{layer.name}': the {layer.weight.dtype} codes fill their range and there is "
            "no scale: it was lost; start from the original model"
        )


def lost_its_scale(layer: StoredLayer) -> bool:
    """Whether these are FP8 codes that fill their range, and nothing scales them.

    The whole weight is read only where a part of it holds large numbers.
    """
    if layer.weight.dtype not in FP8 or layer.first(*FP8_SCALES, *RIVALS) is not None:
        return False
    part = layer.sampled(layer.codes)
    if not bool((levels_of(part.dtype).widen(part).abs() >= LARGE).any()):
        return False
    return is_saturated(layer.read(layer.codes))


def is_saturated(weight: torch.Tensor) -> bool:
    """Whether the largest magnitude of FP8 codes is exactly 448 or 57344: scaled codes reach it,
    plain casts do not.
    """
    levels = levels_of(weight.dtype)
    return weight.numel() > 0 and float(levels.widen(weight).abs_().max()) == levels.qmax


def _decode(codes: torch.Tensor, scale: torch.Tensor, label: Label) -> torch.Tensor:
    geometry = label.geometry.geometry(label.size)
    scale = scale.float().reshape(geometry.grid_shape(tuple(codes.shape)))
    return decode(codes, scale, levels_of(codes.dtype), geometry)


def rotates(format: str) -> bool:
    """Whether a format's codes can be rotated."""
    return "convrot_groupsize" in get_format(format).Options.names()


def levels_of(dtype: torch.dtype) -> Levels:
    """What one-byte codes of an FP8 or INT8 layer stand for."""
    names = labels()[DTYPE_NAMES[dtype]].values()
    return get_format(next(iter(names))).levels


def _odd_rank(dialect: str, layer: StoredLayer, scale: ScaleOf | None, note: str) -> Translation:
    """Convolutions, norms and stacked experts: ComfyUI would use their codes as numbers, so they
    are decoded.
    """
    shape = layer.weight.shape
    if scale is not None and layer.specs[scale.suffix].numel != 1:
        raise CheckpointError(
            f"weight is {len(shape)}-D {list(shape)} with {scale.suffix} "
            f"{list(layer.specs[scale.suffix].shape)}; only matrices can have more than one scale"
        )

    def decode_plain(tensors: Tensors) -> torch.Tensor:
        codes = tensors[layer.codes]
        if scale is None:
            _refuse_lost_scale(layer, codes)
        values = levels_of(codes.dtype).widen(codes)
        if scale is None:
            return values
        return values * scale.read(tensors).float().reshape(())

    return floating(
        dialect,
        layer,
        shape,
        decode_plain,
        note=f"{note}; not 2-D: decoded" if note else "not 2-D: decoded",
    )
