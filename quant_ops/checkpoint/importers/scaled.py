"""FP8 or INT8 codes beside one scale tensor: what seven dialects have in common; the label comes
from the shapes.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ....kernels.grids import Levels, decode
from ...errors import CheckpointError
from ...formats import Arrangement, get_format
from ...formats.base import PRECISE
from ...formats.convrot import stored_group
from ...sources import DTYPE_NAMES
from ...spec import FLOAT_DTYPES, LayerInput
from ..labels import Label, label_of, labels
from .base import StoredLayer, Tensors, Translation, floating, quantized, resolved

logger = logging.getLogger(__name__)

UNSCALED = "no scale: assumed 1.0"


def translate_scaled(
    dialect: str,
    layer: StoredLayer,
    note: str,
    *,
    tag: str = "",
    precise: bool = False,
    convrot: int | None = None,
) -> Translation:
    """`weight` and `weight_scale` (or `scale_weight`, or for FP8 none: 1.0) -> the format that
    their shapes mean.

    Args:
        tag: the format that the layer's JSON names, for the one case that shapes leave open.
        convrot: rotation group of the codes, None for unrotated ones.

    Raises:
        CheckpointError: no format holds this arrangement, or a rotated layer without one scale per
            row.
    """
    suffix = layer.first("weight_scale", "scale_weight")
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
        return _odd_rank(dialect, layer, suffix, note)
    label = label_of(
        layer.weight.dtype, layer.matrix, scale_shape, tag, layer.said.get("group_size")
    )
    options = resolved(label.format, {**label.options, PRECISE: precise})
    source = LayerInput(layer.matrix, None)
    if convrot is not None:
        if label.geometry is not Arrangement.ROW:
            raise CheckpointError(
                f"weight_scale is {list(scale_shape)}; rotated codes (convrot) need one scale per "
                f"row, as ({source.shape[0]}, 1)"
            )
        group = stored_group({"convrot_groupsize": convrot}, source)
        options = replace(options, convrot=True, convrot_groupsize=group)
    if tag and tag != label.format:
        note = f"{note}; {tag} -> {label.format}"
    if options is None:
        note = f"{note}; blocks of {label.size} are not written by any format: decoded"
        return floating(dialect, layer, layer.matrix, lambda t: _decode(t, suffix, label), note)

    def rename(tensors: Tensors) -> Tensors:
        if suffix is None and is_saturated(tensors["weight"]):
            logger.warning(
                "layer %r: largest code is the largest possible: its scale was probably lost",
                layer.name,
            )
        return {
            "weight": tensors["weight"],
            "weight_scale": tensors[suffix] if suffix else torch.ones(()),
        }

    return quantized(dialect, layer, label.format, source, options, rename, note)


def is_saturated(weight: torch.Tensor) -> bool:
    """Whether the largest magnitude of FP8 codes is exactly 448 or 57344: scaled codes reach it,
    plain casts do not.
    """
    levels = _levels(weight.dtype)
    return weight.numel() > 0 and float(levels.widen(weight).abs_().max()) == levels.qmax


def _decode(tensors: Tensors, suffix: str, label: Label) -> torch.Tensor:
    codes, geometry = tensors["weight"], label.geometry.geometry(label.size)
    scale = tensors[suffix].float().reshape(geometry.grid_shape(tuple(codes.shape)))
    return decode(codes, scale, _levels(codes.dtype), geometry)


def _levels(dtype: torch.dtype) -> Levels:
    """What one-byte codes of an FP8 or INT8 layer stand for."""
    names = labels()[DTYPE_NAMES[dtype]].values()
    return get_format(next(iter(names))).levels


def _odd_rank(dialect: str, layer: StoredLayer, suffix: str | None, note: str) -> Translation:
    """Convolutions, norms and stacked experts: ComfyUI would use their codes as numbers, so they
    are decoded.
    """
    shape = layer.weight.shape
    if suffix is not None and layer.specs[suffix].numel != 1:
        raise CheckpointError(
            f"weight is {len(shape)}-D {list(shape)} with {suffix} "
            f"{list(layer.specs[suffix].shape)}; only matrices can have more than one scale"
        )

    def decode_plain(tensors: Tensors) -> torch.Tensor:
        weight = tensors["weight"]
        values = _levels(weight.dtype).widen(weight)
        return values if suffix is None else values * tensors[suffix].float().reshape(())

    return floating(
        dialect,
        layer,
        shape,
        decode_plain,
        f"{note}; not 2-D: decoded" if note else "not 2-D: decoded",
    )
