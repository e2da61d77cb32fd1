"""What a runtime tensor does with its stored codes: dequantize to a dtype, and multiply without dequantizing first.

Spec of all bodies: the float32 product code * scale, rounded once to the output dtype; matmuls accumulate in float32.
"""

from __future__ import annotations

from functools import cache

import torch

from .codebook4 import FlatGrid
from .dispatch import op
from .grids import Levels, decode
from .packing import unpack_nibbles
from .scales import Geometry
from .triton import why_not_triton


@cache
def code_values(levels: Levels) -> tuple[float, ...]:
    """The value of each of the 16 codes."""
    return tuple(levels.widen(torch.arange(16, dtype=torch.uint8)).tolist())


@op
def dequantize_tiles(
    codes: torch.Tensor, scale: torch.Tensor, levels: Levels, geometry: Geometry, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K) codes and their `geometry.grid_shape` float32 scales -> (N, K) `dtype`."""
    return decode(codes, scale, levels, geometry).to(dtype)


@op
def dequantize_flat4(
    packed: torch.Tensor, absmax: torch.Tensor, levels: Levels, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K/2) uint8, high nibble first, and (ceil(N*K/group_size),) float32 -> (N, K) `dtype`."""
    codes = unpack_nibbles(packed, high_first=True)
    return FlatGrid(levels, group_size).decode(codes, absmax).to(dtype)


@op
def linear_flat4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    levels: Levels,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias for 4-bit codes, products accumulated in float32.

    Eager rounds W to x's dtype; the fused kernel rounds the table instead and multiplies absmax in float32.

    Args:
        x: (M, K) float32, float16 or bfloat16.
        packed, absmax: as `dequantize_flat4`.
        bias: (N,) of x's dtype, or None.
    """
    return torch.nn.functional.linear(x, dequantize_flat4(packed, absmax, levels, group_size, x.dtype), bias)


@dequantize_tiles.backend("triton", lambda codes, *rest: why_not_triton(codes))
def _dequantize_tiles(codes, scale, levels, geometry, dtype):
    from .triton import tiles

    return tiles.dequantize(codes, scale, geometry, dtype)


@dequantize_flat4.backend("triton", lambda packed, *rest: why_not_triton(packed))
def _dequantize_flat4(packed, absmax, levels, group_size, dtype):
    from .triton import flat4

    return flat4.dequantize(packed, absmax, code_values(levels), group_size, dtype)


def _why_not_fused(x, packed, absmax, levels, group_size, bias):
    m, k = x.shape
    if x.dtype == torch.float32:
        return "float32 input: the tensor cores would round it"
    if k % group_size:
        return f"blocks of {group_size} straddle rows: K={k}"
    if m > FUSED_ROWS:
        return f"M={m} > {FUSED_ROWS}: dequantize and matmul is faster"
    return why_not_triton(x)


# Above this many rows of x, dequantize + library matmul wins: kernels/triton/flat4.py, TILE.
FUSED_ROWS = 16


@linear_flat4.backend("triton", _why_not_fused)
def _linear_flat4(x, packed, absmax, levels, group_size, bias):
    from .triton import flat4

    return flat4.linear(x, packed, absmax, code_values(levels), group_size, bias)
