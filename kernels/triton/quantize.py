"""Quantize weights in one pass: the scale of each region, its codes, two 4-bit codes per byte. Bits
as eager's.

scale = absmax / qmax, 1 where absmax < TINY; q = round(w / scale); a zero region gets codes that
decode to +0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..levels import Levels
from ..scales import TINY, Geometry
from .encode import KINDS, byte_of_codes, code_word, table_of, upper_nibble, whole_absmax
from .launch import launch
from .rounding import divide, divide_small, magnitude, nearest_integer, scale_of

_INT8, _E4M3 = tl.constexpr(KINDS["int8"]), tl.constexpr(KINDS["e4m3fn"])

# (elements, warps) of a program. Measured on an H200, 12288x3072 and 3072x15360, bf16 bytes read
# per second over the bytes of a copy: INT8 1x128 .65-.66 (8192 elements on 8 warps .60); NF4 .64
# (2048, 4: .58; 8192, 8: .63); FP8 rows .66 and .64 (8 warps .56, 8192 elements .58); INT8 128
# .57-.58 (8192, 2048: .55; 4096, 1024: .47); FP8 tensor .39, others alike.
GROUPS = (4096, 4)  # whole groups, at least one
PACKED = (4096, 4)  # the same, where two codes share a byte
# a row that fits is held in registers; the last size also walks longer ones
ROWS = ((4096, 4), (16384, 16))
TILES = (16384, 2048)  # most elements at a time, and elements per warp
TENSOR = (4096, 4)
# narrower tiles go side by side, so that a row of a program is a whole number of cache lines
TILE_COLUMNS = 64


@triton.jit
def _codes(value, absmax, scale, table, KIND: tl.constexpr, FLOOR: tl.constexpr):
    """Codes of float32 values under scales of their own regions: no quotient is past the largest
    code.
    """
    inverse = divide(1.0, scale)
    if KIND == _INT8:
        return nearest_integer(divide_small(value, scale, inverse))
    else:
        value = tl.where(absmax < FLOOR, 0.0, value)  # zeros of zero regions lose their sign
        if KIND == _E4M3:
            return (value * inverse).to(tl.float8e4nv)
        else:
            return upper_nibble(code_word(value * inverse, table, KIND), KIND)


@triton.jit
def _groups(
    x, table, codes, scale, count, groups,
    KIND: tl.constexpr, QMAX: tl.constexpr, FLOOR: tl.constexpr, PACK: tl.constexpr,
    GROUP: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Groups of consecutive elements; the last one may be shorter."""
    base = tl.program_id(0).to(tl.int64) * (RUNS * GROUP)
    run = tl.arange(0, RUNS)
    at = run[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + base + at, at < count - base, other=0.0).to(tl.float32)
    absmax = tl.max(magnitude(value), 1).to(tl.float32, bitcast=True)
    s = scale_of(absmax, QMAX, FLOOR)
    first = tl.program_id(0).to(tl.int64) * RUNS
    tl.store(scale + first + run, s, run < groups - first)
    if PACK:
        inverse = tl.where(absmax < FLOOR, 0.0, divide(1.0, s))
        word = code_word(value * inverse[:, None], table, KIND)
        even, odd = tl.split(tl.reshape(word, (RUNS, GROUP // 2, 2)))
        half = run[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        tl.store(
            codes + base // 2 + half, byte_of_codes(even, odd, KIND), half < (count - base) // 2
        )
    else:
        q = _codes(value, absmax[:, None], s[:, None], table, KIND, FLOOR)
        tl.store(codes + base + at, q, at < count - base)


def quantize_groups(
    x: torch.Tensor, levels: Levels, group: int, pack: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of consecutive elements of (N, K) -> codes (N, K), or (N, K/2) high nibble first, and
    (groups,) scales.
    """
    n, k = x.shape
    count = x.numel()
    groups = -(-count // group)
    codes = torch.empty((n, k // 2 if pack else k), dtype=levels.dtype, device=x.device)
    scale = torch.empty(groups, dtype=torch.float32, device=x.device)
    elements, warps = PACKED if pack else GROUPS
    runs = max(elements // group, 1)
    tensors = (x.contiguous(), table_of(levels, x.device), codes, scale)
    numbers = (count, groups, KINDS[levels.name], levels.qmax, TINY, pack, group, runs)
    launch(_groups, (-(-groups // runs), 1, 1), tensors, *numbers, num_warps=warps)
    return codes, scale


@triton.jit
def _rows(
    x, table, codes, scale, k,
    KIND: tl.constexpr, QMAX: tl.constexpr,
    FLOOR: tl.constexpr, HOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if HOLD:
        value = tl.load(x + row * k + at, at < k, other=0.0).to(tl.float32)
        absmax = tl.max(magnitude(value), 0).to(tl.float32, bitcast=True)
        s = scale_of(absmax, QMAX, FLOOR)
        tl.store(codes + row * k + at, _codes(value, absmax, s, table, KIND, FLOOR), at < k)
    else:
        largest = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, k, BLOCK):
            value = tl.load(x + row * k + start + at, start + at < k, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude(value))
        absmax = tl.max(largest, 0).to(tl.float32, bitcast=True)
        s = scale_of(absmax, QMAX, FLOOR)
        for start in range(0, k, BLOCK):  # the row again, from the cache
            value = tl.load(x + row * k + start + at, start + at < k, other=0.0).to(tl.float32)
            tl.store(
                codes + row * k + start + at,
                _codes(value, absmax, s, table, KIND, FLOOR),
                start + at < k,
            )
    tl.store(scale + row, s)


@triton.jit
def _tiles(
    x, table, codes, scale, k, grid_cols,
    KIND: tl.constexpr, QMAX: tl.constexpr, FLOOR: tl.constexpr,
    SIZE: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """SIDE tiles of SIZE x SIZE side by side, STEP rows at a time; one step holds them in
    registers.
    """
    tile = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, STEP)
    at = row[:, None, None] * k + tile[None, :, None] * SIZE + tl.arange(0, SIZE)[None, None, :]
    inside = (tile < grid_cols)[None, :, None]
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    largest = magnitude(value)
    for start in range(STEP, SIZE, STEP):
        value = tl.load(x + at + start * k, inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(value))
    if SIDE == 1:
        most = tl.full((1,), 0, tl.int32) + tl.max(largest)
    else:
        most = tl.max(tl.max(largest, 2), 0)
    absmax = most.to(tl.float32, bitcast=True)
    s = scale_of(absmax, QMAX, FLOOR)
    tl.store(scale + tl.program_id(0) * grid_cols + tile, s, tile < grid_cols)
    absmax, s = absmax[None, :, None], s[None, :, None]
    if STEP == SIZE:
        tl.store(codes + at, _codes(value, absmax, s, table, KIND, FLOOR), inside)
    else:
        for start in range(0, SIZE, STEP):  # the tile again, from the cache
            value = tl.load(x + at + start * k, inside, other=0.0).to(tl.float32)
            tl.store(codes + at + start * k, _codes(value, absmax, s, table, KIND, FLOOR), inside)


@triton.jit
def _tensor(
    x, table, absmax, codes, scale, count,
    KIND: tl.constexpr, QMAX: tl.constexpr, FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes under one scale, last elements first: those are still in the cache after the search for
    the largest.
    """
    most = tl.load(absmax)
    s = scale_of(most, QMAX, FLOOR)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, at < count, other=0.0).to(tl.float32)
    tl.store(codes + at, _codes(value, most, s, table, KIND, FLOOR), at < count)
    if block == 0:
        tl.store(scale, s)


def quantize_tiles(
    x: torch.Tensor, levels: Levels, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K) -> (N, K) codes, float32 scales as a grid of tiles."""
    n, k = x.shape
    rows, cols = geometry.rows, geometry.cols
    x = x.contiguous()
    if rows == 1 and cols:
        codes, scale = quantize_groups(x, levels, cols, False)
        return codes, scale.view(n, -1)
    codes = torch.empty((n, k), dtype=levels.dtype, device=x.device)
    scale = torch.empty((n // (rows or n), k // (cols or k)), dtype=torch.float32, device=x.device)
    table, how = table_of(levels, x.device), (KINDS[levels.name], levels.qmax, TINY)
    if rows is None:
        elements, warps = TENSOR
        grid = (-(-x.numel() // elements), 1, 1)
        tensors = (x, table, whole_absmax(x), codes, scale)
        launch(_tensor, grid, tensors, x.numel(), *how, elements, num_warps=warps)
    elif rows == 1:
        elements, warps = next((shape for shape in ROWS if k <= shape[0]), ROWS[-1])
        block = min(triton.next_power_of_2(k), elements)
        launch(
            _rows, (n, 1, 1), (x, table, codes, scale), k, *how, k <= block, block, num_warps=warps
        )
    else:
        elements, per_warp = TILES
        side = max(TILE_COLUMNS // cols, 1)
        step = min(rows, elements // (side * cols))
        warps = max(step * side * cols // per_warp, 1)
        grid = (n // rows, -(-(k // cols) // side), 1)
        numbers = (k, k // cols, *how, cols, side, step)
        launch(_tiles, grid, (x, table, codes, scale), *numbers, num_warps=warps)
    return codes, scale
