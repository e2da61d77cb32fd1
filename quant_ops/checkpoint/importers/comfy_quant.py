"""Layers whose JSON names a format of ours or of ComfyUI.

| stored | becomes |
|---|---|
| JSON and shapes that agree | itself |
| FP8 or INT8, its scale of another format than the JSON | that of the shapes, scale reshaped |
| group size in one place only, `orig_dtype` with `torch.` | both places, plain dtype names |
| scale in bf16 or fp16, (1,) for (), (N,) for (N, 1) | float32 of the format's own shape |
| file header without `.comfy_quant` tensors | both |
"""

from __future__ import annotations

import math
from dataclasses import replace

from ...errors import CheckpointError, RecipeError
from ...formats import FORMATS, Format, FormatOptions, get_format
from ...spec import FLOAT_DTYPES, ITEM_SIZES, TensorSpec
from ..labels import is_scaled, labels
from .base import ImportOptions, StoredLayer, Tensors, Translation, quantized
from .scaled import rotates, translate_scaled

NOT_READ = ("svdquant_w4a4",)


class ComfyQuant:
    def claims(self, layer: StoredLayer) -> bool:
        return bool(layer.said.get("format"))

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation | None:
        name = layer.said["format"]
        if options.foreign_only and (name not in FORMATS or len(layer.weight.shape) == 3):
            return None  # ComfyUI may know it; it has layers of stacked experts, for example
        if name in NOT_READ:
            raise CheckpointError(f"format {name} is not read; start from the original model")
        try:
            format = get_format(name)
        except RecipeError as error:
            raise CheckpointError(str(error)) from None
        if layer.said.get("convrot") and not rotates(name):
            raise CheckpointError(f"its JSON says rotated (convrot), and {name} never is")
        fitting = _fitting(format, layer)
        if fitting is None and is_scaled(name) and layer.weight.dtype in labels():
            convrot = (
                layer.said.get("convrot_groupsize", 256) if layer.said.get("convrot") else None
            )
            return translate_scaled(
                "comfy_quant-relabelled",
                layer,
                "scales reshaped",
                tag=name,
                precise=layer.precise,
                convrot=convrot,
            )
        specs, stored_options = fitting or _tidied(format, layer)
        source = format.stored_layer(layer.said, specs)
        made = quantized(
            "comfy_quant",
            layer,
            name,
            source,
            options=stored_options,
            convert=lambda tensors: _present(tensors, specs),
            note="",
        )
        same = all(
            suffix in layer.specs and (layer.specs[suffix].dtype, layer.specs[suffix].shape) == spec
            for suffix, spec in made.outputs.items()
        )
        same = same and not made.warnings  # which say what is dropped
        if options.foreign_only and same and not layer.misspelled:
            return None
        if not same:
            return replace(made, dialect="comfy_quant-completed", note="scales reshaped")
        if made.marker == layer.header_marker and layer.tensor_marker is None:
            return replace(
                made, dialect="comfy_quant-in-header", note="JSON also beside the layer", stock=True
            )
        if made.marker == layer.marker:
            return made
        return replace(made, dialect="comfy_quant-completed", note="JSON completed")


def _fitting(
    format: Format, layer: StoredLayer
) -> tuple[dict[str, TensorSpec], FormatOptions] | None:
    """Specs and options when the stored tensors are exactly the format's."""
    try:
        return layer.specs, format.options_from(layer.said, layer.specs)
    except CheckpointError:
        return None
    except RecipeError:  # a group size that the format does not write
        return None


def _tidied(format: Format, layer: StoredLayer) -> tuple[dict[str, TensorSpec], FormatOptions]:
    """The same after reshaping side tensors and widening float scales; codes are left alone.

    Raises:
        CheckpointError: what is stored is not this format.
    """
    source = format.stored_layer(layer.said, layer.specs)
    specs = dict(layer.specs)
    for suffix, (dtype, shape) in format.tensor_specs(source, format.Options()).items():
        stored = layer.specs.get(suffix)
        if stored is None or suffix == "weight":
            continue
        widened = dtype == "F32" and stored.dtype in FLOAT_DTYPES
        renamed = ITEM_SIZES[dtype] == ITEM_SIZES[stored.dtype] == 1
        flat = replace(stored, dtype=dtype if widened or renamed else stored.dtype)
        specs[suffix] = replace(flat, shape=shape) if _same_but_ones(flat.shape, shape) else flat
    try:
        return specs, format.options_from(layer.said, specs)
    except RecipeError as error:
        raise CheckpointError(str(error)) from None


def _same_but_ones(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the shapes differ in sizes of 1 only, or one is flat: a transposed grid is not the
    same grid.
    """
    sizes = [size for size in shape if size != 1]
    others = [size for size in wanted if size != 1]
    flat = len(sizes) == 1 and math.prod(others) == sizes[0]
    return sizes == others or flat


def _present(tensors: Tensors, specs: dict[str, TensorSpec]) -> Tensors:
    return {suffix: tensors[suffix] for suffix in specs if suffix in tensors}
