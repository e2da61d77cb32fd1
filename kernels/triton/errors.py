"""Squared errors of codes, patch by patch: weight and code are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .encode import block_columns
from .launch import launch
from .rounding import product
from .tiles import kind_of, widen

TABLE = tl.constexpr(4)  # beside the kinds of `tiles`: 4-bit codes


@triton.jit
def _patches(
    x, codes, scale, values, error, signal, projection, largest,
    n, k, grid_cols, tile_rows, tile_cols,
    KIND: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows[:, None] < n) & (cols[None, :] < k)
    at = rows[:, None] * k + cols[None, :]
    w = tl.load(x + at, inside, 0.0).to(tl.float32)
    raw = tl.load(codes + at, inside, 0)
    value = tl.load(values + raw.to(tl.int32)) if KIND == TABLE else widen(raw, KIND)
    # A program's columns lie in one tile, so each of its rows has one scale.
    s = tl.load(
        scale + rows // tile_rows * grid_cols + tl.program_id(1) * BK // tile_cols, rows < n, 0.0
    )
    difference = tl.where(inside, product(value, s[:, None]) - w, 0.0)
    to = rows * tl.num_programs(1) + tl.program_id(1)
    tl.store(error + to, tl.sum(difference * difference, 1), rows < n)
    tl.store(signal + to, tl.sum(w * w, 1), rows < n)
    tl.store(projection + to, tl.sum(difference * w, 1), rows < n)
    tl.store(largest + to, tl.max(tl.abs(difference), 1), rows < n)


def patches(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, K) floats and codes, scales as a grid over them -> of runs within a row the squared
    errors, squared weights, products of error and weight, and the largest error.

    Args:
        values: (16,) float32 of 4-bit codes, which lie one per byte.

    Returns:
        (N, runs) float32 each; runs are equally long, but for the last one, and none crosses a tile
        of scales.
    """
    n, k = weight.shape
    grid_rows, grid_cols = scale.shape
    tile_cols = k // grid_cols
    block_k = block_columns(k, tile_cols)
    block_n = 2048 // block_k
    runs = -(-k // block_k)
    parts = tuple(
        torch.empty((n, runs), dtype=torch.float32, device=weight.device) for _ in range(4)
    )
    raw = codes.contiguous().view(torch.uint8 if codes.dtype == torch.uint8 else torch.int8)
    tensors = (weight.contiguous(), raw, scale.contiguous(), values, *parts)
    kind = TABLE.value if codes.dtype == torch.uint8 else kind_of(codes)
    numbers = (n, k, grid_cols, n // grid_rows, tile_cols, kind, block_n, block_k)
    launch(_patches, (-(-n // block_n), runs, 1), tensors, *numbers, num_warps=4)
    return parts
