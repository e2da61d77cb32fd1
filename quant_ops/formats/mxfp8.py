"""MXFP8: e4m3fn codes, one E8M0 exponent per 32 weights along K."""

from __future__ import annotations

import torch

from ...kernels.dispatch import Op
from ...kernels.levels import E4M3
from ...kernels.mxfp8 import BLOCK, Mxfp8Grid
from ...kernels.packing import swizzle_scales, unswizzle_scales
from ...kernels.runtime import linear_mxfp8
from ..spec import LayerInput
from .base import FormatOptions, register_format
from .padded import PaddedFormat

BIAS = 127  # of E8M0: byte e means 2^(e - 127)


class Mxfp8(PaddedFormat):
    """Padded to multiples of 32 both ways; the scales lie in cuBLAS' order.

    Example:

        448 -2 0.3 0 x29

    is stored as

        weight F8_E4M3 (32, 32): 7e c0 2a 00 x1021
        weight_scale U8 (128, 4): 7f 00 x511
        comfy_quant: {"format": "mxfp8", "group_size": 32, "params": {"group_size": 32},
            "orig_dtype": "float32", "orig_shape": [1, 32]}
    """

    name, min_comfyui = "mxfp8", "0.18.0"
    unit = "mxfp8"
    read_as = ("hybrid_mxfp8",)
    stores = f"one power of two per {BLOCK} weights of a row"
    block = BLOCK
    weight_dtype, scale_dtype, aliases = "F8_E4M3", "U8", {"weight_scale": "F8_E8M0"}

    def grid(self, layer: LayerInput, options: FormatOptions) -> Mxfp8Grid:
        return Mxfp8Grid()

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        return {"weight": codes, "weight_scale": swizzle_scales(scale)}

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        n, k = layer.shape
        return Mxfp8Grid().decode(tensors["weight"], _exponents(tensors))[:n, :k]

    def product(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> tuple[Op, tuple] | None:
        if options.full_precision_matrix_mult or self.padded(layer.shape) != layer.shape:
            return None
        exponent = tensors["weight_scale"].view(torch.float8_e8m0fnu)
        return linear_mxfp8, (tensors["weight"], exponent)

    def overflowing(self, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> int:
        n, k = weight.shape
        blocks = weight[:, : k // BLOCK * BLOCK].reshape(n, -1, BLOCK)
        exponents = _exponents(tensors)[:n, : k // BLOCK].float()
        reached = E4M3.qmax * torch.exp2(exponents - BIAS)
        return int((blocks.abs().amax(-1) > reached).sum())


def _exponents(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, columns / 32) biased exponents, uint8."""
    rows, cols = tensors["weight"].shape
    return unswizzle_scales(tensors["weight_scale"].view(torch.uint8), rows, cols // BLOCK)


register_format(Mxfp8())
