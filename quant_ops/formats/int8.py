"""INT8: q = round(w / scale) in [-127, 127], one scale per tensor, row, tile or group (FORMATS 3.3, 3.4).

int8_tensorwise is native.
"""

from __future__ import annotations

from ...kernels.grids import INT8
from ...kernels.scales import Geometry
from ..spec import FormatOptions, LayerInput, TensorSpec
from .base import register_format
from .tiled import BlockFormat, TiledFormat, with_precision


class Int8Tensorwise(TiledFormat):
    """Row scales by default. A tensor scale is 0-d, rows are (N, 1): comfy-kitchen requantizes by the scale's rank."""

    name, min_comfyui, native = "int8_tensorwise", "0.27.0", True
    embedding_min_comfyui = "0.29.0"
    levels, dtype = INT8, "I8"
    choices = {"scaling": ("row", "tensor")}
    defaults = FormatOptions(scaling="row")
    layout_options = ("scaling",)

    def geometry(self, options: FormatOptions) -> Geometry:
        return Geometry(1, None) if options.scaling == "row" else Geometry(None, None)

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (shape[0], 1) if options.scaling == "row" else ()

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        per_row = {"per_row": True} if options.scaling == "row" else {}
        return with_precision({"format": self.name, **per_row}, options)

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        scale = specs.get("weight_scale")
        row = scale is not None and len(scale.shape) > 0
        precise = marker.get("full_precision_matrix_mult", False)
        return self.resolve(FormatOptions("row" if row else "tensor", full_precision_matrix_mult=precise))


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
