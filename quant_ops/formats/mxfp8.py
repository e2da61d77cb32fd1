"""MXFP8: e4m3fn codes, one E8M0 exponent per 32 weights along K (FORMATS 3.5). Native."""

from __future__ import annotations

import torch

from ...kernels.mxfp8 import BLOCK, Mxfp8Grid
from ...kernels.packing import swizzle_scales, unswizzle_scales
from ..spec import FormatOptions, LayerInput
from .base import register_format
from .padded import PaddedFormat


class Mxfp8(PaddedFormat):
    name, min_comfyui = "mxfp8", "0.18.0"
    block = BLOCK
    weight_dtype, scale_dtype, alias = "F8_E4M3", "U8", "F8_E8M0"

    def grid(self, layer: LayerInput, options: FormatOptions) -> Mxfp8Grid:
        return Mxfp8Grid()

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        return {"weight": codes, "weight_scale": swizzle_scales(scale)}

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        codes = tensors["weight"]
        rows, cols = codes.shape
        scale = unswizzle_scales(tensors["weight_scale"].view(torch.uint8), rows, cols // BLOCK)
        n, k = layer.shape
        return Mxfp8Grid().decode(codes, scale)[:n, :k]


register_format(Mxfp8())
