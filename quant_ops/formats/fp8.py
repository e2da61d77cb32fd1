"""FP8: q = cast(w / scale) with one scale per tensor, row, tile or group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...kernels.levels import E4M3, E5M2
from .arrangement import Arrangement
from .base import PRECISE, FormatOptions, register_format
from .chain import FP8_ROW
from .tiled import BLOCK_SIZES, BlockFormat, BlockOptions, TiledFormat


class ScalarFP8(TiledFormat):
    """Codes (N, K) and one scale; also what ComfyUI's loaders make of FP8 files of older tools."""

    native = True
    embedding_min_comfyui = "0.21.0"
    unit = "fp8"
    arrangements = (Arrangement.TENSOR,)

    @dataclass(frozen=True)
    class Options(FormatOptions):
        scaling: str = "tensor"

        choices: ClassVar = {"scaling": ("tensor",)}


class Float8E4M3(ScalarFP8):
    """The most versions of ComfyUI read it; also what FP8 files of older tools become.

    Example:

        448 -2 0.3 0
        1 0.001 -100 7

    is stored as

        weight F8_E4M3 (2, 4): 7e c0 2a 00 38 01 ec 4e
        weight_scale F32 (): 00 00 80 3f
        comfy_quant: {"format": "float8_e4m3fn"}
    """

    name, min_comfyui = "float8_e4m3fn", "0.4.0"
    short, called = "fp8", ("fp8_scaled",)
    levels, largest_input = E4M3, E4M3.qmax


class Float8E5M2(ScalarFP8):
    """Always `full_precision_matrix_mult`: no e5m2 x e5m2 matmul exists, and e5m2 activations keep
    2 mantissa bits.

    Example:

        448 -2 0.3 0
        1 0.001 -100 7

    is stored as

        weight F8_E5M2 (2, 4): 7b dc 51 00 58 30 f2 63
        weight_scale F32 (): 00 00 00 3c
        comfy_quant: {"format": "float8_e5m2", "full_precision_matrix_mult": true}
    """

    name, min_comfyui = "float8_e5m2", "0.8.0"
    levels, largest_input = E5M2, E5M2.qmax

    @dataclass(frozen=True)
    class Options(ScalarFP8.Options):
        full_precision_matrix_mult: bool = True

        choices: ClassVar = {**ScalarFP8.Options.choices, PRECISE: (True,)}


class Float8Rowwise(TiledFormat):
    """One scale per row, stored as (N,).

    Example:

        448 -2 0.3 0
        1 0.001 -100 7

    is stored as

        weight F8_E4M3 (2, 4): 7e c0 2a 00 49 02 fe 60
        weight_scale F32 (2): 00 00 80 3f 49 92 64 3e
        comfy_quant: {"format": "float8_e4m3fn_rowwise"}
    """

    name, native, min_comfyui = "float8_e4m3fn_rowwise", False, "0.8.0"
    levels = E4M3
    arrangements = (Arrangement.ROW,)

    @dataclass(frozen=True)
    class Options(FormatOptions):
        scaling: str = "row"

        choices: ClassVar = {"scaling": ("row",)}

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (shape[0],)


class Float8Blockwise(BlockFormat):
    """One scale per square tile; N and K are multiples of its side.

    Example with block_size=16:

        448 -2 0.3 0 x13 1 0 x15
        15 rows of 0 x32

    is stored as

        weight F8_E4M3 (16, 32): 7e c0 2a 00 x13 7e 00 x495
        weight_scale F32 (1, 2): 00 00 80 3f 25 49 12 3b
        comfy_quant: {"format": "float8_e4m3fn_blockwise", "group_size": 16, "params":
            {"group_size": 16}}
    """

    name, instead = "float8_e4m3fn_blockwise", FP8_ROW
    levels = E4M3
    arrangements = (Arrangement.TILE,)

    @dataclass(frozen=True)
    class Options(BlockOptions):
        choices: ClassVar = {"scaling": ("block2d",), "block_size": BLOCK_SIZES}


class Float8Block3d(BlockFormat):
    """The scale has a third dimension of size 1, as convert_to_quant writes it.

    Example with block_size=16:

        448 -2 0.3 0 x13 1 -0.5 0 x14

    is stored as

        weight F8_E4M3 (1, 32): 7e c0 2a 00 x13 7e f6 00 x14
        weight_scale F32 (1, 2, 1): 00 00 80 3f 25 49 12 3b
        comfy_quant: {"format": "float8_e4m3fn_block3d", "group_size": 16, "params":
            {"group_size": 16}}
    """

    name, instead = "float8_e4m3fn_block3d", FP8_ROW
    levels = E4M3
    arrangements = (Arrangement.GROUP,)
    lacks_group_size = True

    @dataclass(frozen=True)
    class Options(BlockOptions):
        choices: ClassVar = {"scaling": ("block", "block3d"), "block_size": BLOCK_SIZES}

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (*self.geometry(options).grid_shape(shape), 1)


register_format(Float8E4M3())
register_format(Float8E5M2())
register_format(Float8Rowwise())
register_format(Float8Blockwise())
register_format(Float8Block3d())
