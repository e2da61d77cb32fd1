"""NF4 and FP4 with bitsandbytes' tables: g consecutive elements of the flattened weight share
absmax (FORMATS 3.9).
"""

from __future__ import annotations

import torch

from ...kernels.codebook4 import FP4, NF4, FlatGrid, nearest_flat4
from ...kernels.dispatch import Op
from ...kernels.grids import Levels
from ...kernels.packing import pack_nibbles, unpack_nibbles
from ...kernels.runtime import dequantize_flat4, linear_flat4
from ..errors import CheckpointError
from ..spec import FormatOptions, LayerInput, TensorSpec
from .base import Format, dtype_from_json, dtype_to_json, register_format, with_precision

INT8_ROW = ("int8_tensorwise", FormatOptions(scaling="row"))


class Bnb4Bit(Format):
    """weight (N, K/2) uint8, high nibble first, and `absmax` (ceil(N * K / g),) float32."""

    native, min_comfyui = False, "0.8.0"
    choices = {"block_size": (32, 64, 128, 256, 512, 1024, 2048, 4096)}
    defaults = FormatOptions(block_size=64)
    layout_options = ("block_size",)
    levels: Levels

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        return f"K={layer.shape[1]} is odd" if layer.shape[1] % 2 else None

    def fallback(self, layer: LayerInput, options: FormatOptions) -> tuple[str, FormatOptions]:
        return INT8_ROW

    def notes(self, layer: LayerInput, options: FormatOptions) -> tuple[str, ...]:
        k, size = layer.shape[1], options.block_size
        return (f"blocks of {size} straddle rows: K={k}, no fast kernel",) if k % size else ()

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

    def options_from(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        order = marker.get("nibble_order")
        if order not in ("high", "hi_first"):
            raise CheckpointError(
                f"nibble_order is {order!r}, {self.name} stores the high nibble first"
            )
        params = marker.get("params", {})
        size = marker.get(
            "group_size", params.get("group_size") if isinstance(params, dict) else None
        )
        precise = marker.get("full_precision_matrix_mult", False)
        options = self.resolve(FormatOptions(block_size=size, full_precision_matrix_mult=precise))
        self.refuse_misfit(self.stored_layer(marker, specs), options, specs)
        return options

    def grid(self, layer: LayerInput, options: FormatOptions) -> FlatGrid:
        return FlatGrid(self.levels, options.block_size)

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        return {"weight": pack_nibbles(codes, high_first=True), "absmax": scale}

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
        codes = unpack_nibbles(tensors["weight"], high_first=True)
        return FlatGrid(self.levels, options.block_size).decode(codes, tensors["absmax"])

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
        return None if options.full_precision_matrix_mult else (linear_flat4, arguments)


class BnbNF4(Bnb4Bit):
    name, levels = "bnb_nf4", NF4


class BnbFP4(Bnb4Bit):
    name, levels = "bnb_fp4", FP4
    # Emoji model, mean SSIM of 8 prompts: nearest .887, mse_clip .909. bnb_nf4 has .948 and .953:
    # not worth 2.3 times the time on a CPU.
    method = "mse_clip"


register_format(BnbNF4())
register_format(BnbFP4())
