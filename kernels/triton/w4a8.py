"""W4A8: fit and round groups of 16 in registers; decode levels, rotation and row scale at once.
Bits as eager's.

Decoding multiplies by a matrix of signs: integers up to 127 and their sums over a rotation group
are exact in float16 factors and float32 sums, whatever their order; so the bits are those of
butterflies.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..codebook4 import constant
from ..hadamard import rotate
from ..scales import TINY
from .launch import launch
from .rounding import divide, magnitude, nearest_even, product

COLUMNS = 256  # of a tile
# Milliseconds for 12288x3072 to bf16 on an H200, rotated by 256: .054; 32 rows and 8 warps .060, 64
# and 8 .070, 8 and 4 .060. A copy of the bf16 weight takes .040, eager 2.5.
ROWS, WARPS = 16, 4


@triton.jit
def int8_value(level, step):
    """round(level * step), clamped to +-127; NaN stays."""
    value = nearest_even(product(level, step))
    return tl.where(value > 127.0, 127.0, tl.where(value < -127.0, -127.0, value))


@triton.jit
def _dequantize(
    packed, relative, channel, levels, floats, signs, out, n, k,
    SIDE: tl.constexpr, TWICE: tl.constexpr,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = tl.program_id(1) * COLUMNS
    half = start // 2 + tl.arange(0, COLUMNS // 2)[None, :]
    byte = tl.load(packed + rows * (k // 2) + half, (rows < n) & (half < k // 2), 0).to(tl.int32)
    level = tl.join(tl.load(levels + (byte & 15)), tl.load(levels + (byte >> 4)))
    group = start // 16 + tl.arange(0, COLUMNS // 16)[None, :]
    step = tl.load(relative + rows * (k // 16) + group, (rows < n) & (group < k // 16), 0)
    step = tl.load(floats + step.to(tl.int32))  # GPUs before sm_89 convert no e4m3fn
    value = int8_value(tl.reshape(level, (ROWS, COLUMNS // 16, 16)), step[:, :, None])
    across = tl.arange(0, SIDE)
    sign = tl.load(signs + across[:, None] * SIDE + across[None, :])
    sums = tl.dot(tl.reshape(value.to(tl.float16), (ROWS * COLUMNS // SIDE, SIDE)), sign)
    # H256 is H16 along 16 neighbours, then along every 16th; sums of 16 codes are still exact in
    # float16
    if TWICE:
        turned = tl.permute(tl.reshape(sums.to(tl.float16), (ROWS, SIDE, SIDE)), (0, 2, 1))
        sums = tl.dot(tl.reshape(turned, (ROWS * SIDE, SIDE)), sign)
        sums = tl.permute(tl.reshape(sums, (ROWS, SIDE, SIDE)), (0, 2, 1))
    scale = tl.load(channel + rows, rows < n, 0.0)
    column = start + tl.arange(0, COLUMNS)[None, :]
    weight = tl.reshape(sums, (ROWS, COLUMNS)) * FACTOR * scale
    tl.store(out + rows * k + column, weight.to(out.dtype.element_ty), (rows < n) & (column < k))


@cache
def _floats(device: torch.device) -> torch.Tensor:
    """(256,) float32 value of each e4m3fn byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@cache
def _signs(side: int, device: torch.device) -> torch.Tensor:
    """(side, side) float16 rotation, its entries +-1."""
    return (rotate.eager(torch.eye(side), side) * side**0.5).to(device, torch.float16)


def dequantize(
    packed: torch.Tensor,
    relative: torch.Tensor,
    channel: torch.Tensor,
    levels: torch.Tensor,
    span: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(N, K/2) bytes, (N, K/16) float8_e4m3fn, (N,) and (16,) float32 -> (N, K) `dtype`, rotated
    `span` by `span`.
    """
    n, half = packed.shape
    out = torch.empty((n, 2 * half), dtype=dtype, device=packed.device)
    stored = (tensor.contiguous().view(torch.uint8) for tensor in (packed, relative))
    side = min(span, 64) if span < COLUMNS else 16
    tables = (levels.contiguous(), _floats(packed.device), _signs(side, packed.device))
    tensors = (*stored, channel.contiguous(), *tables, out)
    numbers = (n, 2 * half, side, span > side, span**-0.5, ROWS, COLUMNS)  # powers of two: exact
    launch(
        _dequantize, (-(-n // ROWS), -(-2 * half // COLUMNS), 1), tensors, *numbers, num_warps=WARPS
    )
    return out


GROUP = tl.constexpr(16)
# Groups and warps of a program of the kernels below. Milliseconds for 12288x3072 float32 on an
# H200, fit and codes: .33 and .25; 64 groups on 4 warps .33 and .29, 256 on 8 .36 and .27. Eager 9
# and 9.
GROUPS, GROUP_WARPS = 128, 4


def _over_groups(
    kernel: triton.JITFunction, tensors: tuple[torch.Tensor, ...], count: int, *numbers: int | float
) -> None:
    launch(
        kernel, (-(-count // GROUPS), 1, 1), tensors, count, *numbers, GROUPS, num_warps=GROUP_WARPS
    )


@triton.jit
def _fold(x, GROUPS: tl.constexpr):
    """Sum of each group of 16, always in the same order: x[i] + x[i+8], then +4, +2, +1."""
    a, b = tl.split(tl.permute(tl.reshape(x, (GROUPS, 2, 8)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, (GROUPS, 2, 4)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, (GROUPS, 2, 2)), (0, 2, 1)))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def _nearest_level(x, levels, thresholds):
    level = tl.zeros_like(x) + tl.load(levels)
    for code in tl.static_range(15):
        level = tl.where(x <= tl.load(thresholds + code), level, tl.load(levels + code + 1))
    return level


@triton.jit
def _not_below(x, FLOOR: tl.constexpr):
    """max(x, FLOOR); NaN stays."""
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def _fit(
    x, levels, thresholds, scale, largest, count,
    PASSES: tl.constexpr, FLOOR: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    w = tl.load(x + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], inside[:, None], 0.0).to(
        tl.float32
    )
    absmax = tl.max(magnitude(w), 1).to(tl.float32, bitcast=True)
    s = tl.where(absmax < ZERO, 1.0, absmax)
    level = _nearest_level(divide(w, s[:, None]), levels, thresholds)
    for _ in tl.static_range(PASSES):
        weighted, squared = _fold(product(w, level), GROUPS), _fold(product(level, level), GROUPS)
        s = _not_below(divide(weighted, _not_below(squared, FLOOR)), FLOOR)
        level = _nearest_level(divide(w, s[:, None]), levels, thresholds)
    most = tl.max(magnitude(level * s[:, None]), 1).to(tl.float32, bitcast=True)
    tl.store(scale + group, s, inside)
    tl.store(largest + group, tl.where(absmax < ZERO, 0.0, most), inside)


def fit(
    weight: torch.Tensor,
    levels: tuple[float, ...],
    thresholds: tuple[float, ...],
    passes: int,
    floor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) floats -> (N, K/16) float32 scales of groups, and the largest magnitude each then
    decodes to.
    """
    n, k = weight.shape
    scale, largest = (
        torch.empty((n, k // 16), dtype=torch.float32, device=weight.device) for _ in range(2)
    )
    tables = (constant(levels, weight.device), constant(thresholds, weight.device))
    _over_groups(
        _fit, (weight.contiguous(), *tables, scale, largest), scale.numel(), passes, floor, TINY
    )
    return scale, largest


@triton.jit
def _nearest(
    x, channel, relative, floats, levels,
    codes, count, per_row, ZERO: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    w = tl.load(x + at, inside[:, None], 0.0).to(tl.float32)
    zero = tl.max(magnitude(w), 1).to(tl.float32, bitcast=True) < ZERO
    # GPUs before sm_89 convert no e4m3fn
    step = tl.load(floats + tl.load(relative + group, inside, 0).to(tl.int32))
    v = divide(w, tl.load(channel + group // per_row, inside, 1.0)[:, None])
    below = tl.zeros_like(v).to(tl.int32)
    under, above = tl.zeros_like(v), tl.full(v.shape, float("inf"), tl.float32)
    for code in tl.static_range(16):  # levels ascend, and so do their INT8 values
        q8 = int8_value(tl.load(levels + code), step)[:, None]
        less = q8 < v
        below += less.to(tl.int32)
        under = tl.where(less, q8, under)
        above = tl.where(less, above, tl.minimum(above, q8))
    nearer = (below > 0) & (below < 16) & (tl.abs(v - above) < tl.abs(v - under))
    code = tl.maximum(below, 1) - 1 + nearer.to(tl.int32)
    tl.store(codes + at, tl.where(zero[:, None], 0, code).to(tl.uint8), inside[:, None])


def nearest(
    weight: torch.Tensor, channel: torch.Tensor, relative: torch.Tensor, levels: tuple[float, ...]
) -> torch.Tensor:
    """(N, K) floats, (N,) float32, (N, K/16) float8_e4m3fn -> (N, K) uint8 codes of the nearest
    INT8 values.
    """
    n, k = weight.shape
    codes = torch.empty((n, k), dtype=torch.uint8, device=weight.device)
    tables = (_floats(weight.device), constant(levels, weight.device))
    stored = (channel.contiguous(), relative.contiguous().view(torch.uint8))
    _over_groups(
        _nearest, (weight.contiguous(), *stored, *tables, codes), codes.numel() // 16, k // 16, TINY
    )
    return codes


@triton.jit
def _errors(
    x, codes, channel, relative, floats, levels, error, signal, projection, largest, count, per_row,
    GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    w = tl.load(x + at, inside[:, None], 0.0).to(tl.float32)
    step = tl.load(floats + tl.load(relative + group, inside, 0).to(tl.int32))[:, None]
    q8 = int8_value(tl.load(levels + tl.load(codes + at, inside[:, None], 0).to(tl.int32)), step)
    difference = product(q8, tl.load(channel + group // per_row, inside, 1.0)[:, None]) - w
    tl.store(error + group, tl.sum(difference * difference, 1), inside)
    tl.store(signal + group, tl.sum(w * w, 1), inside)
    tl.store(projection + group, tl.sum(difference * w, 1), inside)
    tl.store(largest + group, tl.max(tl.abs(difference), 1), inside)


def errors(
    weight: torch.Tensor,
    codes: torch.Tensor,
    channel: torch.Tensor,
    relative: torch.Tensor,
    levels: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, K) floats and codes, their scales -> of each group the squared errors, squared weights,
    products of error and weight, and the largest error; (N, K/16) float32 each.
    """
    parts = tuple(
        torch.empty(relative.shape, dtype=torch.float32, device=weight.device) for _ in range(4)
    )
    tables = (_floats(weight.device), constant(levels, weight.device))
    stored = (codes.contiguous(), channel.contiguous(), relative.contiguous().view(torch.uint8))
    _over_groups(
        _errors,
        (weight.contiguous(), *stored, *tables, *parts),
        relative.numel(),
        relative.shape[1],
    )
    return parts
