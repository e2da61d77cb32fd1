"""Quantize activations to INT8 or FP8: scale = absmax / qmax, q = round(x / scale); x read once,
codes written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..levels import E4M3, Levels
from ..scales import TINY
from .launch import launch
from .rounding import divide, divide_many, magnitude, round_int8, scale_of


@triton.jit
def _encode(x, scale, zero, QMAX: tl.constexpr, FLOAT8: tl.constexpr):
    inverse = divide(1.0, scale)
    if FLOAT8:
        q = x * inverse
        q = tl.minimum(tl.maximum(q, -QMAX, tl.PropagateNan.ALL), QMAX, tl.PropagateNan.ALL)
        codes = tl.where(zero, 0.0, q).to(tl.float8e4nv)
    else:
        codes = round_int8(divide_many(x, scale, inverse))
    return codes


@triton.jit
def _rows(
    x, codes, scale, k, stride,
    QMAX: tl.constexpr, FLOAT8: tl.constexpr,
    FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, k, BLOCK):
        value = tl.load(x + row * stride + start + at, start + at < k, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(value))
    absmax = tl.max(largest, 0).to(tl.float32, bitcast=True)
    s = scale_of(absmax, QMAX, FLOOR)
    tl.store(scale + row, s)
    for start in range(0, k, BLOCK):  # the row again, from the cache
        value = tl.load(x + row * stride + start + at, start + at < k, other=0.0).to(tl.float32)
        tl.store(
            codes + row * k + start + at,
            _encode(value, s, absmax < FLOOR, QMAX, FLOAT8),
            start + at < k,
        )


@triton.jit
def _groups(
    x, codes, scale, pitch, count, groups,
    QMAX: tl.constexpr, FLOAT8: tl.constexpr,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    at = run[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (run < count)[:, None]
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    absmax = tl.max(magnitude(value), 1).to(tl.float32, bitcast=True)
    s = scale_of(absmax, QMAX, FLOOR)
    tl.store(
        codes + at, _encode(value, s[:, None], (absmax < FLOOR)[:, None], QMAX, FLOAT8), inside
    )
    tl.store(scale + run % groups * pitch + run // groups, s, run < count)


# (longest row, (elements at a time, warps)): on an H200, 4608 rows, times those of a copy of as
# many bytes: FP8 1.4 at K = 3072, 1.17 at 12288, 1.13 at 15360; INT8 1.55, 1.31, 1.31.
ROW_BLOCKS = ((4096, (1024, 4)), (12288, (4096, 8)), (None, (8192, 16)))


def quantize(
    x: torch.Tensor,
    levels: Levels,
    group: int | None,
    shape: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) -> (M, K) codes and (M, groups) float32 scales, M fastest, columns at multiples of 16
    bytes.
    """
    m, k = x.shape
    if x.stride(1) != 1 or (group and x.stride(0) != k):
        x = x.contiguous()
    codes = torch.empty((m, k), dtype=levels.dtype, device=x.device)
    groups = k // group if group else 1
    pitch = -(-m // 4) * 4
    scale = torch.empty((groups, pitch), dtype=torch.float32, device=x.device)
    how = levels.qmax, levels is E4M3, TINY
    if group:
        runs = max(4096 // group, 1)
        grid = (-(-m * groups // runs), 1, 1)
        numbers = (pitch, m * groups, groups, *how, group, runs)
        launch(_groups, grid, (x, codes, scale), *numbers, num_warps=4)
    else:
        fitting = (shape for limit, shape in ROW_BLOCKS if limit is None or k <= limit)
        most, warps = shape or next(fitting)
        block = min(1 << (k - 1).bit_length(), most)
        numbers = (k, x.stride(0), *how, block)
        launch(_rows, (m, 1, 1), (x, codes, scale), *numbers, num_warps=warps)
    return codes, scale[:, :m].t()
