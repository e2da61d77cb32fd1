"""float8_e4m3fn and float8_e5m2: q = cast(w / scale), one scale for the tensor (FORMATS 3.1). Native in ComfyUI."""

from __future__ import annotations

from ...kernels.grids import E4M3, E5M2
from ...kernels.scales import Geometry
from ..spec import FormatOptions
from .base import register_format
from .tiled import TiledFormat, with_precision


class ScalarFP8(TiledFormat):
    native = True
    embedding_min_comfyui = "0.21.0"
    choices = {"scaling": ("tensor",)}
    defaults = FormatOptions(scaling="tensor")

    def geometry(self, options: FormatOptions) -> Geometry:
        return Geometry(None, None)

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return ()

    def marker(self, shape: tuple[int, int], options: FormatOptions) -> dict:
        return with_precision({"format": self.name}, options)


class Float8E4M3(ScalarFP8):
    name, min_comfyui = "float8_e4m3fn", "0.4.0"
    levels, dtype = E4M3, "F8_E4M3"


class Float8E5M2(ScalarFP8):
    """Always `full_precision_matrix_mult`: no e5m2 x e5m2 matmul exists, and e5m2 activations keep 2 mantissa bits."""

    name, min_comfyui = "float8_e5m2", "0.8.0"
    levels, dtype = E5M2, "F8_E5M2"
    defaults = FormatOptions(scaling="tensor", full_precision_matrix_mult=True)


register_format(Float8E4M3())
register_format(Float8E5M2())
