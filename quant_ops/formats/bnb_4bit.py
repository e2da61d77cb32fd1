"""NF4 and FP4 with bitsandbytes' tables: g consecutive elements of the flattened weight share
absmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.codebook4 import FP4, NF4, FlatGrid, nearest_flat4
from ...kernels.dispatch import Op
from ...kernels.levels import Levels
from ...kernels.packing import pack_nibbles, unpack_nibbles
from ...kernels.runtime import dequantize_flat4, linear_flat4
from ..errors import CheckpointError
from ..spec import LayerInput, TensorSpec
from .base import (
    Format,
    FormatOptions,
    dtype_from_json,
    dtype_to_json,
    register_format,
    stated_in,
    with_precision,
)
from .chain import INT8_ROW, Next

PREFIX = "bnb_"  # with it, a table's name is that of a format, also of one that is only read


class Bnb4Bit(Format):
    """weight (N, K/2) uint8, high nibble first, and `absmax` (ceil(N * K / g),) float32."""

    native, min_comfyui = False, "0.8.0"
    stores = "one scale per block of the flattened weight"
    codes_per_byte = 2
    layout_options = ("block_size",)
    levels: Levels
    table: str  # what bitsandbytes calls the table of levels

    @dataclass(frozen=True)
    class Options(FormatOptions):
        block_size: int = 64

        choices: ClassVar = {"block_size": (32, 64, 128, 256, 512, 1024, 2048, 4096)}

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        if layer.shape[1] % 2:
            return f"K={layer.shape[1]} is odd"
        return None

    def fallback(self, layer: LayerInput, options: FormatOptions) -> Next:
        return INT8_ROW

    def notes(self, layer: LayerInput, options: FormatOptions) -> tuple[str, ...]:
        k, size = layer.shape[1], options.block_size
        if k % size:
            return (f"blocks of {size} straddle rows: K={k}, no fast kernel",)
        return ()

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        return 1, 2

    def tensor_specs(
        self, layer: LayerInput, options: FormatOptions
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        n, k = layer.shape
        return {
            "weight": ("U8", (n, k // 2)),
            "absmax": ("F32", (-(-n * k // options.block_size),)),
        }

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        size = options.block_size
        marker = {
            "format": self.name,
            "group_size": size,
            "params": {"group_size": size},
            "shape": list(layer.shape),
            "nibble_order": "high",
        }
        if layer.dtype:
            marker["dtype"] = dtype_to_json(layer.dtype)
        return with_precision(marker, options)

    def stored_layer(self, marker: dict, specs: dict[str, TensorSpec]) -> LayerInput:
        n, half = self.stored_matrix(specs)
        shape = marker.get("shape", [n, 2 * half])
        if shape != [n, 2 * half]:
            raise CheckpointError(f"shape is {shape}, but the stored weight holds {[n, 2 * half]}")
        return LayerInput((n, 2 * half), dtype_from_json(marker.get("dtype")))

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> dict[str, object]:
        order = marker.get("nibble_order")
        if order not in ("high", "hi_first"):
            raise CheckpointError(
                f"nibble_order is {order!r}, {self.name} stores the high nibble first"
            )
        size = stated_in(marker, "group_size")
        if size is None:
            return {}
        return {"block_size": size}

    def grid(self, layer: LayerInput, options: FormatOptions) -> FlatGrid:
        return FlatGrid(self.levels, options.block_size)

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        return {"weight": pack_nibbles(codes, high_first=True), "absmax": scale}

    def codes(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return unpack_nibbles(tensors["weight"], high_first=True)

    def quantize(
        self, prepared: torch.Tensor, grid: FlatGrid, options: FormatOptions, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        if seed:
            return super().quantize(prepared, grid, options, seed)
        codes, absmax = nearest_flat4(prepared, self.levels, options.block_size, True)
        return {"weight": codes, "absmax": absmax}

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        grid = FlatGrid(self.levels, options.block_size)
        return grid.decode(self.codes(tensors), tensors["absmax"])

    def dequantize_to(
        self,
        tensors: dict[str, torch.Tensor],
        layer: LayerInput,
        options: FormatOptions,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return dequantize_flat4(
            tensors["weight"], tensors["absmax"], self.levels, options.block_size, dtype
        )

    def product(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> tuple[Op, tuple] | None:
        arguments = (tensors["weight"], tensors["absmax"], self.levels, options.block_size)
        if options.full_precision_matrix_mult:
            return None
        return (linear_flat4, arguments)


class BnbNF4(Bnb4Bit):
    """NF4: levels of a normal distribution.

    Example:

        1 -1 0.5 0 0.1 -0.3 2 -2

    is stored as

        weight U8 (1, 4): c2 a7 85 f0
        absmax F32 (1): 00 00 00 40
        comfy_quant: {"format": "bnb_nf4", "group_size": 64, "params": {"group_size": 64},
            "shape": [1, 8], "nibble_order": "high", "dtype": "float32"}
    """

    name, levels, table = "bnb_nf4", NF4, "nf4"
    short = "nf4"
    read_as = ("bnb_af4",)


class BnbFP4(Bnb4Bit):
    """FP4: a sign, two bits of exponent, one of mantissa.

    Example:

        1 -1 0.5 0 0.1 -0.3 2 -2

    is stored as

        weight U8 (1, 4): 5d 70 1e 3b
        absmax F32 (1): 00 00 00 40
        comfy_quant: {"format": "bnb_fp4", "group_size": 64, "params": {"group_size": 64},
            "shape": [1, 8], "nibble_order": "high", "dtype": "float32"}
    """

    name, levels, table = "bnb_fp4", FP4, "fp4"
    short = "fp4"
    # Emoji model, mean SSIM of 8 prompts: nearest .887, mse_clip .909. bnb_nf4 has .948 and .953:
    # not worth 2.3 times the time on a CPU.
    method = "mse_clip"


register_format(BnbNF4())
register_format(BnbFP4())
