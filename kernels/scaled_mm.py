"""torch's own FP8 products (`torch._scaled_mm`) over our codes: one scale per row, or 1 x 128 by
128 x 128 blocks.
"""

from __future__ import annotations

import torch

from .device import gpu_of
from .levels import E4M3
from .scales import Geometry
from .triton import why_not_triton


def why_not_scaled_mm(x: torch.Tensor, codes: torch.Tensor, geometry: Geometry) -> str | None:
    """Why torch cannot multiply this; None when it can. The quantizer must be fused, or it eats the
    gain.
    """
    reason = why_not_triton(x)
    if reason:
        return reason
    if codes.dtype != torch.float8_e4m3fn:
        return "INT8 codes: torch scales products of FP8 codes only"
    gpu = gpu_of(x)
    if gpu.capability[0] != 9:
        return f"{gpu.sm}: torch has these products for sm_90"
    if x.dtype != torch.bfloat16:
        return "torch scales rows into bfloat16 only"
    if geometry.cols is not None and (geometry.rows, geometry.cols) != (128, 128):
        return f"torch has no {geometry.rows} x {geometry.cols} blocks"
    n, k = codes.shape
    if n % 16 or k % 16:
        return f"{n}x{k} is not made of multiples of 16"
    # cuBLAS wants rows of scales at addresses divisible by 16
    if geometry.cols and (len(x) % 4 or k % 512):
        return f"M={len(x)}, K={k}: block scales need multiples of 4 and 512"
    return None


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor:
    """(M, K) bfloat16 @ (N, K).T + bias, x quantized per row or per 128 elements."""
    from .triton import activations

    x_codes, x_scale = activations.quantize(x, E4M3, geometry.cols)
    if geometry.cols is None:
        w_scale = scale.t() if geometry.rows == 1 else scale.expand(1, len(codes)).contiguous()
        return torch._scaled_mm(x_codes, codes.t(), x_scale, w_scale, bias=bias, out_dtype=x.dtype)
    out = torch._scaled_mm(x_codes, codes.t(), x_scale, scale.t(), out_dtype=x.dtype)
    if bias is None:
        return out
    return out.add_(bias)
