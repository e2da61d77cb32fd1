"""NVFP4: E2M1 codes, one e4m3fn scale per 16 weights along K and one float32 per tensor."""

from __future__ import annotations

import torch

from ...kernels.codebook4 import E2M1
from ...kernels.dispatch import Op
from ...kernels.levels import E4M3
from ...kernels.nvfp4 import BLOCK, Nvfp4Grid, Nvfp4Scale
from ...kernels.packing import pack_nibbles, swizzle_scales, unpack_nibbles, unswizzle_scales
from ...kernels.runtime import linear_nvfp4
from ..spec import LayerInput
from .base import FormatOptions, register_format
from .padded import PaddedFormat


class Nvfp4(PaddedFormat):
    """Padded to multiples of 16 both ways, the high nibble first; the scales lie in cuBLAS' order.

    Example:

        6 -2 0.3 0 x13

    is stored as

        weight U8 (16, 8): 7c 10 00 x126
        weight_scale F8_E4M3 (128, 4): 7e 00 x511
        weight_scale_2 F32 (): 25 49 12 3b
        comfy_quant: {"format": "nvfp4", "group_size": 16, "params": {"group_size": 16},
            "orig_dtype": "float32", "orig_shape": [1, 16]}
    """

    name, min_comfyui = "nvfp4", "0.8.0"
    unit, largest_input = "nvfp4", E4M3.qmax * E2M1.qmax
    stores = f"one scale per {BLOCK} weights of a row, in steps of one per tensor"
    block, codes_per_byte = BLOCK, 2
    weight_dtype, scale_dtype, aliases = "U8", "F8_E4M3", {"weight_scale": "U8"}

    def tensor_specs(
        self, layer: LayerInput, options: FormatOptions
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {**super().tensor_specs(layer, options), "weight_scale_2": ("F32", ())}

    def grid(self, layer: LayerInput, options: FormatOptions) -> Nvfp4Grid:
        return Nvfp4Grid()

    def pack(
        self, codes: torch.Tensor, scale: Nvfp4Scale, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        swizzled = swizzle_scales(scale.block.view(torch.uint8)).view(torch.float8_e4m3fn)
        return {
            "weight": pack_nibbles(codes, high_first=True),
            "weight_scale": swizzled,
            "weight_scale_2": scale.per_tensor,
        }

    def codes(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return unpack_nibbles(tensors["weight"], high_first=True)

    def product(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> tuple[Op, tuple] | None:
        if options.full_precision_matrix_mult or self.padded(layer.shape) != layer.shape:
            return None
        block = tensors["weight_scale"].view(torch.float8_e4m3fn)
        return linear_nvfp4, (tensors["weight"], block, tensors["weight_scale_2"])

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        codes = self.codes(tensors)
        rows, cols = codes.shape
        block = unswizzle_scales(tensors["weight_scale"].view(torch.uint8), rows, cols // BLOCK)
        scale = Nvfp4Scale(tensors["weight_scale_2"], block.contiguous().view(torch.float8_e4m3fn))
        n, k = layer.shape
        return Nvfp4Grid().decode(codes, scale)[:n, :k]


register_format(Nvfp4())
