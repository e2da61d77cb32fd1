"""Layers that are not what their neighbours suggest: plain FP8 casts, dummy scales, and what
is refused.

| stored | becomes |
|---|---|
| `weight` FP8, no scale anywhere | float8_e4m3fn or float8_e5m2 with scale 1.0 |
| unreadable JSON, FP8 codes | by dtype and scale shape |
| floating-point `weight`, JSON that names a format or is unreadable, no scale | the weight alone |
| floating-point `weight` with `scale_weight` or `weight_scale` | the weight alone, bit for bit |
| the same, and the weight holds codes as floats | refused |
| `weight` U8 with block scales, no JSON | refused, unless the user says nvfp4 (bare_nvfp4.py) |

ComfyUI itself reads the first as it is, and would cast the weight beside a `scale_weight` to FP8.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...formats.nvfp4 import Nvfp4
from ...spec import FLOAT_DTYPES
from .bare_nvfp4 import translate_bare_nvfp4
from .base import FP8, ImportOptions, StoredLayer, Tensors, Translation
from .scaled import PLAIN, refuse_rivals, translate_scaled

# What a weight loses when it is decoded, and some tools leave.
STRAY = (
    "scale_weight", "weight_scale", "weight_scale_2", "weight_scale_inv", "input_scale",
    "scale_input", "output_scale", "SCB", "weight_format",
)  # fmt: skip
FP8_LARGEST = (448.0, 57344.0)  # e4m3fn, e5m2: scaled codes reach it, weights of models do not


class PlainFp8:
    """Plain casts, and FP8 layers whose JSON is unreadable or names no format."""

    def claims(self, layer: StoredLayer) -> bool:
        return layer.weight.dtype in FP8

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation | None:
        refuse_rivals(layer, layer.first(*PLAIN))
        if layer.marker is None and layer.unreadable is None:
            if options.foreign_only:
                return None
            return translate_scaled("plain-fp8", layer, "")
        return translate_scaled(
            "comfy_quant-relabelled", layer, "format read off the shapes", precise=layer.precise
        )


class BlocksWithoutJson:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.weight.dtype == "U8" and {"weight_scale", "weight_scale_2"} <= set(layer.specs)

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        if options.assume == Nvfp4.name:
            return translate_bare_nvfp4(layer, options)
        raise CheckpointError(
            "packed 4-bit weight with block scales but without readable JSON: the order of scales "
            f"and nibbles is unknown; make the file again, or say that it is {Nvfp4.name}",
            option="assume_nvfp4",
        )


class OrphanMarker:
    """A float weight beside JSON that calls it quantized, or that is none, and no scale: what a
    merge of files leaves.
    """

    def claims(self, layer: StoredLayer) -> bool:
        named = layer.marker is not None or layer.unreadable is not None
        scaled = layer.first("weight_scale", "scale_weight", "weight_s_rel", "absmax")
        return named and layer.weight.dtype in FLOAT_DTYPES and scaled is None

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        return Translation(
            dialect="orphan-marker",
            outputs={"weight": (layer.weight.dtype, layer.weight.shape)},
            convert=lambda tensors: {"weight": tensors["weight"]},
            note="high precision: the marker is dropped",
        )


def stray_scales(layer: StoredLayer) -> tuple[str, ...]:
    """The scales beside a weight that has no marker; ComfyUI multiplies no float weight by them."""
    if layer.said.get("format"):
        return ()
    return tuple(suffix for suffix in STRAY if suffix in layer.specs)


class DummyScale:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.weight.dtype in FLOAT_DTYPES and bool(stray_scales(layer))

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        values = {suffix: layer.number(suffix) for suffix in stray_scales(layer)}
        warnings = tuple(
            f"layer '{layer.name}': high precision, its {suffix} "
            f"{list(layer.specs[suffix].shape) if value is None else value} is dropped"
            for suffix, value in values.items()
            if value != 1.0
        )

        def keep(tensors: Tensors) -> Tensors:
            if warnings:
                _refuse_codes_as_floats(layer, tensors["weight"])
            return {"weight": tensors["weight"]}

        outputs = {"weight": (layer.weight.dtype, layer.weight.shape)}
        return Translation(
            dialect="dummy-scale",
            outputs=outputs,
            convert=keep,
            note="high precision: dummy scale dropped",
            warnings=warnings,
            stock="scale_weight" not in layer.specs,
        )


def _refuse_codes_as_floats(layer: StoredLayer, weight: torch.Tensor) -> None:
    """
    Raises:
        CheckpointError: the weight holds codes, so the scale beside it is none to drop.
    """
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    whole = largest > 1 and bool((weight == weight.round()).all())
    if whole or largest in FP8_LARGEST:
        what = "whole numbers only" if whole else f"values up to {largest:g}, as FP8 codes have,"
        raise CheckpointError(
            f"the weight is {layer.weight.dtype} and holds {what} with {stray_scales(layer)[0]} "
            "beside it: these are codes; start from the original model"
        )
