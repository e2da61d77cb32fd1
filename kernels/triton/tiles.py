"""Dequantize FP8 and INT8 codes with a grid of scales: y = round(code * scale), each byte read
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..scales import Geometry
from . import why_not_float8
from .encode import block_columns
from .launch import launch

_KIND = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


@triton.jit
def widen(raw, KIND: tl.constexpr):
    """float32 value of each code, given as int8."""
    if KIND == 0:
        value = raw.to(tl.float32)
    elif KIND == 3:
        value = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif KIND == 1:
        # e4m3fn to float16 bits: the sign-extended shift leaves the sign in bits 15 and 14; then
        # times 2^8.
        half = ((raw.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * 256.0
        value = tl.where((raw & 127) == 127, float("nan"), value)
    else:
        value = (raw.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _dequantize(
    codes,
    scale,
    out,
    n,
    k,
    grid_cols,
    tile_rows,
    tile_cols,
    KIND: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows[:, None] < n) & (cols[None, :] < k)
    at = rows[:, None].to(tl.int64) * k + cols[None, :]
    value = widen(tl.load(codes + at, inside, other=0), KIND)
    # A program's columns lie in one tile, so each of its rows has one scale.
    s = tl.load(
        scale + rows // tile_rows * grid_cols + tl.program_id(1) * BK // tile_cols,
        rows < n,
        other=0.0,
    )
    tl.store(out + at, (value * s[:, None]).to(out.dtype.element_ty), inside)


def kind_of(codes: torch.Tensor) -> int:
    """How this GPU widens these codes."""
    return (
        3
        if codes.dtype == torch.float8_e4m3fn and why_not_float8(codes) is None
        else _KIND[codes.dtype]
    )


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, geometry: Geometry, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K) codes, `geometry.grid_shape` scales -> (N, K) `dtype`."""
    n, k = codes.shape
    codes = codes.contiguous()
    grid_rows, grid_cols = geometry.grid_shape((n, k))
    out = torch.empty((n, k), dtype=dtype, device=codes.device)
    tile_cols = k // grid_cols
    block_k = block_columns(k, tile_cols)
    block_n = 2048 // block_k
    tensors = (codes.view(torch.int8), scale.contiguous(), out)
    numbers = (n, k, grid_cols, n // grid_rows, tile_cols, kind_of(codes), block_n, block_k)
    launch(_dequantize, (-(-n // block_n), -(-k // block_k), 1), tensors, *numbers, num_warps=4)
    return out
