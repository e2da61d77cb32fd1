"""Add the float32 sums of a product that was split along K, and the bias; always in the same
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch


@triton.jit
def _reduce(
    parts, bias, out, count, n, SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        sums += tl.load(parts + part * count + at, inside, other=0.0)
    if BIAS:
        sums += tl.load(bias + at % n, inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), inside)


def reduce_parts(parts: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """(S, M, N) float32 -> out (M, N), the bias (N,) added."""
    block = 1024 if out.numel() >= 1 << 16 else 256
    has_bias = bias is not None
    numbers = (out.numel(), out.shape[1], len(parts), has_bias, block)
    grid = (-(-out.numel() // block), 1, 1)
    launch(_reduce, grid, (parts, bias if has_bias else parts, out), *numbers, num_warps=4)
