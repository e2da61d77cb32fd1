"""FP8 or INT8 codes beside one scale tensor: what seven dialects have in common; the label comes
from the shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from ....kernels.grids import E4M3, E5M2, INT8, decode
from ....kernels.scales import Geometry
from ...errors import CheckpointError
from ...formats.convrot import stored_group
from ...spec import FLOAT_DTYPES, LayerInput
from ..labels import Label, label_of
from .base import StoredLayer, Tensors, Translation, floating, quantized, resolved

logger = logging.getLogger(__name__)

LEVELS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "I8": INT8}
GEOMETRIES: dict[str, Callable[[Label], Geometry]] = {
    "tensor": lambda label: Geometry(None, None),
    "row": lambda label: Geometry(1, None),
    "group": lambda label: Geometry(1, label.size),
    "tile": lambda label: Geometry(label.size, label.size),
}
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
    options = resolved(label.format, replace(label.options, full_precision_matrix_mult=precise))
    source = LayerInput(layer.matrix, None)
    if convrot is not None:
        if label.geometry != "row":
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
                "layer '%s': largest code is the largest possible: its scale was probably lost",
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
    levels = next(levels for levels in LEVELS.values() if levels.dtype == weight.dtype)
    return weight.numel() > 0 and float(levels.widen(weight).abs_().max()) == levels.qmax


def _decode(tensors: Tensors, suffix: str, label: Label) -> torch.Tensor:
    codes, geometry = tensors["weight"], GEOMETRIES[label.geometry](label)
    scale = tensors[suffix].float().reshape(geometry.grid_shape(tuple(codes.shape)))
    levels = next(levels for levels in LEVELS.values() if levels.dtype == codes.dtype)
    return decode(codes, scale, levels, geometry)


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
    widen = LEVELS[layer.weight.dtype].widen

    def decode_plain(tensors: Tensors) -> torch.Tensor:
        values = widen(tensors["weight"])
        return values if suffix is None else values * tensors[suffix].float().reshape(())

    return floating(
        dialect,
        layer,
        shape,
        decode_plain,
        f"{note}; not 2-D: decoded" if note else "not 2-D: decoded",
    )
