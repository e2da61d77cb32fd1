"""INT8: q = round(w / scale) in [-127, 127], one scale per tensor, row, tile or group (FORMATS 3.3,
3.4).

int8_tensorwise is native.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...kernels.grids import INT8
from ...kernels.hadamard import rotate
from ...kernels.scales import Geometry
from ..errors import CheckpointError, RecipeError
from ..spec import FormatOptions, LayerInput, TensorSpec
from . import convrot
from .base import register_format, with_precision
from .tiled import BlockFormat, TiledFormat


class Int8Tensorwise(TiledFormat):
    """Row scales by default. A tensor scale is 0-d, rows are (N, 1): comfy-kitchen requantizes by
    the scale's rank.

    With `convrot` the codes are those of the rotated weight (kernels/hadamard.py); it needs row
    scales.
    """

    name, min_comfyui, native = "int8_tensorwise", "0.27.0", True
    embedding_min_comfyui = "0.29.0"
    levels, dtype = INT8, "I8"
    choices = {
        "scaling": ("row", "tensor"),
        "convrot": (True,),
        "convrot_groupsize": convrot.WRITTEN,
    }
    defaults = FormatOptions(scaling="row")
    layout_options = ("scaling", "convrot_groupsize")

    def resolve(self, options: FormatOptions) -> FormatOptions:
        options = super().resolve(options)
        if options.convrot_groupsize and not options.convrot:
            raise RecipeError(f"format {self.name}: convrot_groupsize needs convrot = true")
        if options.convrot and options.scaling != "row":
            raise RecipeError(
                f"format {self.name}: convrot needs scaling row; got {options.scaling}"
            )
        return (
            replace(options, convrot_groupsize=options.convrot_groupsize or 256)
            if options.convrot
            else options
        )

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        return 1, options.convrot_groupsize or 1

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        return convrot.refusal(layer, options.convrot_groupsize) if options.convrot else None

    def fallback(self, layer: LayerInput, options: FormatOptions) -> tuple[str, FormatOptions]:
        smaller = convrot.smaller_group(layer, options.convrot_groupsize)
        return self.name, replace(
            options, convrot=True if smaller else None, convrot_groupsize=smaller
        )

    def geometry(self, options: FormatOptions) -> Geometry:
        return Geometry(1, None) if options.scaling == "row" else Geometry(None, None)

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (shape[0], 1) if options.scaling == "row" else ()

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        per_row = {"per_row": True} if options.scaling == "row" else {}
        group = options.convrot_groupsize
        rotated = {"convrot": True, "convrot_groupsize": group} if options.convrot else {}
        return with_precision({"format": self.name, **rotated, **per_row}, options)

    def prepare(self, weight: torch.Tensor, options: FormatOptions) -> torch.Tensor:
        return rotate(weight, options.convrot_groupsize) if options.convrot else weight

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        decoded = super().dequantize(tensors, layer, options)
        return rotate(decoded, options.convrot_groupsize) if options.convrot else decoded

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        scale = specs.get("weight_scale")
        row = scale is not None and len(scale.shape) > 0
        precise = marker.get("full_precision_matrix_mult", False)
        options = FormatOptions("row" if row else "tensor", full_precision_matrix_mult=precise)
        params = marker.get("params", {})
        nested = isinstance(params, dict) and params.get("convrot", False)
        if not marker.get("convrot", nested):
            return options
        if not row:
            raise CheckpointError(
                "weight_scale is a single number; a rotated layer (convrot) needs one scale per row"
            )
        group = convrot.stored_group(marker, self.stored_layer(marker, specs))
        return replace(options, convrot=True, convrot_groupsize=group)


register_format(Int8Tensorwise())
BLOCK_SIZES = (16, 32, 64, 128, 256)
ROW = ("int8_tensorwise", FormatOptions(scaling="row"))


class Int8Blockwise(BlockFormat):
    name, two_dimensional, instead = "int8_blockwise", True, ROW
    levels, dtype = INT8, "I8"
    choices = {"scaling": ("block2d", "block"), "block_size": BLOCK_SIZES}
    defaults = FormatOptions(block_size=128)


class Int8Lodewise(BlockFormat):
    name, two_dimensional, instead = "int8_lodewise", False, ROW
    levels, dtype = INT8, "I8"
    choices = {"scaling": ("block",), "block_size": BLOCK_SIZES}
    defaults = FormatOptions(block_size=128)


register_format(Int8Blockwise())
register_format(Int8Lodewise())
