"""FP8: q = cast(w / scale) with one scale per tensor, row, tile or group (FORMATS 3.1, 3.2). Scalar
ones are native.
"""

from __future__ import annotations

from ...kernels.grids import E4M3, E5M2
from ...kernels.scales import Geometry
from ..spec import FormatOptions, LayerInput
from .base import register_format, with_precision
from .tiled import BlockFormat, TiledFormat


class ScalarFP8(TiledFormat):
    native = True
    embedding_min_comfyui = "0.21.0"
    choices = {"scaling": ("tensor",)}
    defaults = FormatOptions(scaling="tensor")

    def geometry(self, options: FormatOptions) -> Geometry:
        return Geometry(None, None)

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return ()

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        return with_precision({"format": self.name}, options)


class Float8E4M3(ScalarFP8):
    name, min_comfyui = "float8_e4m3fn", "0.4.0"
    levels, dtype = E4M3, "F8_E4M3"


class Float8E5M2(ScalarFP8):
    """Always `full_precision_matrix_mult`: no e5m2 x e5m2 matmul exists, and e5m2 activations keep
    2 mantissa bits.
    """

    name, min_comfyui = "float8_e5m2", "0.8.0"
    levels, dtype = E5M2, "F8_E5M2"
    defaults = FormatOptions(scaling="tensor", full_precision_matrix_mult=True)


register_format(Float8E4M3())
register_format(Float8E5M2())


BLOCK_SIZES = (16, 32, 64, 128, 256)
ROW = ("float8_e4m3fn_rowwise", FormatOptions(scaling="row"))


class Float8Rowwise(TiledFormat):
    name, native, min_comfyui = "float8_e4m3fn_rowwise", False, "0.8.0"
    levels, dtype = E4M3, "F8_E4M3"
    choices = {"scaling": ("row",)}
    defaults = FormatOptions(scaling="row")

    def geometry(self, options: FormatOptions) -> Geometry:
        return Geometry(1, None)

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (shape[0],)

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        return with_precision({"format": self.name}, options)


class Float8Blockwise(BlockFormat):
    name, two_dimensional, instead = "float8_e4m3fn_blockwise", True, ROW
    levels, dtype = E4M3, "F8_E4M3"
    choices = {"scaling": ("block2d",), "block_size": BLOCK_SIZES}
    defaults = FormatOptions(block_size=64)


class Float8Block3d(BlockFormat):
    name, two_dimensional, instead = "float8_e4m3fn_block3d", False, ROW
    levels, dtype = E4M3, "F8_E4M3"
    choices = {"scaling": ("block", "block3d"), "block_size": BLOCK_SIZES}
    defaults = FormatOptions(block_size=64)

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (*self.geometry(options).grid_shape(shape), 1)


register_format(Float8Rowwise())
register_format(Float8Blockwise())
register_format(Float8Block3d())
