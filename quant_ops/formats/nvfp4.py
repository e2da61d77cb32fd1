"""NVFP4: E2M1 codes, one e4m3fn scale per 16 weights along K and one float32 per tensor (FORMATS
3.7). Native.
"""

from __future__ import annotations

import torch

from ...kernels.nvfp4 import BLOCK, Nvfp4Grid, Nvfp4Scale
from ...kernels.packing import pack_nibbles, swizzle_scales, unpack_nibbles, unswizzle_scales
from ..spec import FormatOptions, LayerInput
from .base import register_format
from .padded import PaddedFormat


class Nvfp4(PaddedFormat):
    name, min_comfyui = "nvfp4", "0.8.0"
    block, codes_per_byte = BLOCK, 2
    weight_dtype, scale_dtype, alias = "U8", "F8_E4M3", "U8"

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

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        codes = unpack_nibbles(tensors["weight"], high_first=True)
        rows, cols = codes.shape
        block = unswizzle_scales(tensors["weight_scale"].view(torch.uint8), rows, cols // BLOCK)
        scale = Nvfp4Scale(tensors["weight_scale_2"], block.contiguous().view(torch.float8_e4m3fn))
        n, k = layer.shape
        return Nvfp4Grid().decode(codes, scale)[:n, :k]


register_format(Nvfp4())
