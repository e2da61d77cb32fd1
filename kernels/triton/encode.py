"""Codes of weights under given scales, largest magnitudes, nibbles packed. Bits as eager's."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..levels import Levels
from .launch import launch
from .rounding import divide, divide_many, magnitude, round_int8

KINDS = {"int8": 0, "e4m3fn": 1, "nf4": 2, "fp4": 3}
_INT8, _E4M3, _NF4, _FP4 = (tl.constexpr(kind) for kind in KINDS.values())

# Strips of [-1, 1] (NF4) or [0, 1] (FP4), by the upper bits of a fixed-point number; each holds at
# most one threshold.
STRIPS = 32


def strip_table(thresholds: tuple[float, ...], signed: bool) -> tuple[int, ...]:
    """What to add to a 32-bit fixed-point x of each strip, so that its upper 4 bits count the
    thresholds below x.

    x has 31 fraction bits where it is `signed`, else 32: every float near a threshold is exact.
    """
    width = (1 << 32) // STRIPS
    rounded = torch.tensor(thresholds, dtype=torch.float32).tolist()
    # the first x past each
    above = [int(threshold * 2 ** (31 if signed else 32)) + 1 for threshold in rounded]
    table = []
    for strip in range(STRIPS):
        low = width * (strip - STRIPS if signed and strip >= STRIPS // 2 else strip)
        rank = sum(first <= low for first in above)
        inside = [first for first in above if low < first < low + width]
        if len(inside) > 1:
            raise ValueError(f"thresholds {inside} are closer than a strip of {width}")
        entry = ((rank + 1) << 28) - inside[0] if inside else (rank << 28) - low
        table.append((entry + (1 << 31)) % (1 << 32) - (1 << 31))
    return tuple(table)


@cache
def table_of(levels: Levels, device: torch.device) -> torch.Tensor:
    """`strip_table` of a code table on a device; anything for levels that round by arithmetic."""
    values = (0,) * STRIPS
    if levels.kernel:
        values = strip_table(levels.kernel, levels.name == "nf4")
    return torch.tensor(values, dtype=torch.int32, device=device)


# Every lane loads its own entry of the 32, then four elements at a time fetch the entries of their
# strips from each other. A gather from memory would move the tile to another layout and back,
# through shared memory.
_FETCH = tl.constexpr(
    "{ .reg .b32 lane, entry; .reg .b64 at; mov.u32 lane, %laneid; mad.wide.u32 at, lane, 4, $8; "
    "ld.global.nc.b32 entry, [at];"
    + "".join(f" shfl.sync.idx.b32 ${i}, entry, ${i + 4}, 31, -1;" for i in range(4))
    + " }"
)
_FETCH_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,l,l,l,l")


@triton.jit
def fetch(table, strip):
    """table[strip] for a table of 32 entries."""
    address = tl.cast(table, tl.int64, bitcast=True)
    return tl.inline_asm_elementwise(
        _FETCH, _FETCH_REGISTERS, [strip, address], dtype=tl.int32, is_pure=False, pack=4
    )


@triton.jit
def code_word(x, table, KIND: tl.constexpr):
    """x of a 4-bit format -> int32 whose upper 4 bits are the NF4 code, or the sign and the rank of
    |x| for FP4.
    """
    if KIND == _NF4:
        # below -1 the conversion saturates
        fixed = tl.minimum(x * 2147483648.0, 2147483520.0).to(tl.int32)
        word = fixed + fetch(table, fixed.to(tl.uint32, bitcast=True) >> 27)
    else:
        x = tl.math.fma(x, 4294967296.0, 0.0)  # -0 becomes +0: it is not below 0
        fixed = tl.minimum(tl.abs(x), 4294967040.0).to(tl.uint32)
        word = fixed.to(tl.int32, bitcast=True) + fetch(table, fixed >> 27)
        word |= x.to(tl.int32, bitcast=True) & -2147483648
    return word


@triton.jit
def upper_nibble(word, KIND: tl.constexpr):
    """The code in the upper 4 bits of a `code_word`."""
    code = (word >> 28) & 15
    if KIND == _FP4:
        code ^= (code & 2) << 1  # magnitudes in ascending order have the codes 0 1 6 7 4 5 2 3
    return code.to(tl.uint8)


@triton.jit
def byte_of_codes(even, odd, KIND: tl.constexpr):
    """Two `code_word`s -> one byte, the even code in the high nibble."""
    byte = ((even >> 24) & 0xF0) | ((odd >> 28) & 15)
    if KIND == _FP4:
        byte ^= (byte & 0x22) << 1
    return byte.to(tl.uint8)


@triton.jit
def codes_of(value, scale, inverse, table, KIND: tl.constexpr):
    """Codes of float32 values under any scales, one per byte; `inverse` is 1 / scale correctly
    rounded.
    """
    if KIND == _INT8:
        return round_int8(divide_many(value, scale, inverse))
    elif KIND == _E4M3:
        return tl.minimum(tl.maximum(value * inverse, -448.0), 448.0).to(tl.float8e4nv)
    else:
        return upper_nibble(code_word(value * inverse, table, KIND), KIND)


@triton.jit
def _run_absmax(x, out, count, size, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    largest = tl.zeros((RUNS, BLOCK), dtype=tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = (run < count)[:, None] & (at < size)[None, :]
        value = tl.load(x + run[:, None] * size + at[None, :], inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(value))
    tl.store(out + run, tl.max(largest, 1).to(tl.float32, bitcast=True), run < count)


@triton.jit
def _tile_absmax(x, out, k, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, STEP)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    largest = tl.zeros((STEP, COLS), dtype=tl.int32)
    for start in range(0, ROWS, STEP):
        value = tl.load(x + (rows[:, None] + start) * k + cols[None, :]).to(tl.float32)
        largest = tl.maximum(largest, magnitude(value))
    most = tl.max(tl.max(largest, 1), 0).to(tl.float32, bitcast=True)
    tl.store(out + tl.program_id(0) * (k // COLS) + tl.program_id(1), most)


@triton.jit
def _whole_absmax(x, out, count, rounds, programs, BLOCK: tl.constexpr):
    """The largest magnitude of everything into `out`, which holds 0; as int32 bits, so that no
    order matters.
    """
    largest = tl.zeros((BLOCK,), dtype=tl.int32)
    for index in range(rounds):
        at = (index * programs + tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, at < count, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(value))
    tl.atomic_max(out, tl.max(largest, 0), sem="relaxed")


# Elements at a time, warps, most programs: each ends in an atomic on one address. On an H200
# quantizing with one FP8 scale took 12 % longer with (4096, 8, 264), 10 % with (4096, 4, 2048).
WHOLE = (4096, 8, 1024)


def whole_absmax(x: torch.Tensor) -> torch.Tensor:
    """Contiguous floats -> (1, 1) float32; NaN if one is."""
    block, warps, most = WHOLE
    out = torch.zeros((1, 1), dtype=torch.int32, device=x.device)
    blocks = -(-x.numel() // block)
    programs = min(blocks, most)
    numbers = (x.numel(), -(-blocks // programs), programs, block)
    launch(_whole_absmax, (programs, 1, 1), (x, out), *numbers, num_warps=warps)
    return out.view(torch.float32)


def absmax(x: torch.Tensor, rows: int | None, cols: int | None) -> torch.Tensor:
    """(N, K) -> float32 absmax of every tile of rows x cols (None: the whole extent); NaN where a
    tile holds NaN.
    """
    n, k = x.shape
    x = x.contiguous()
    if rows is None:
        return whole_absmax(x)
    out = torch.empty((n // rows, k // (cols or k)), dtype=torch.float32, device=x.device)
    if rows == 1:
        size = cols or k
        block = min(triton.next_power_of_2(size), 1024)
        runs = 4096 // block
        grid = (-(-out.numel() // runs), 1, 1)
        launch(_run_absmax, grid, (x, out), out.numel(), size, runs, block, num_warps=4)
    else:
        step = min(rows, max(4096 // cols, 1))
        launch(_tile_absmax, (*out.shape, 1), (x, out), k, rows, cols, step, num_warps=4)
    return out


def block_columns(k: int, tile_cols: int) -> int:
    """Columns of a program: at most 256, and of one tile of scales."""
    return (
        min(1 << (k - 1).bit_length(), 256) if tile_cols == k else min(tile_cols & -tile_cols, 256)
    )


@triton.jit
def _encode(
    x, scale, table, codes, n, k, grid_cols, tile_rows, tile_cols,
    KIND: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows[:, None] < n) & (cols[None, :] < k)
    at = rows[:, None] * k + cols[None, :]
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    # A program's columns lie in one tile, so each of its rows has one scale.
    s = tl.load(
        scale + rows // tile_rows * grid_cols + tl.program_id(1) * BK // tile_cols,
        rows < n,
        other=1.0,
    )
    s = s[:, None]
    tl.store(codes + at, codes_of(value, s, divide(1.0, s), table, KIND), inside)


def encode(x: torch.Tensor, scale: torch.Tensor, levels: Levels) -> torch.Tensor:
    """(N, K) floats, scales as a grid over it -> (N, K) nearest codes, with ties as the levels
    have them.
    """
    n, k = x.shape
    grid_rows, grid_cols = scale.shape
    codes = torch.empty((n, k), dtype=levels.dtype, device=x.device)
    block_k = block_columns(k, k // grid_cols)
    block_n = 2048 // block_k
    tensors = (x.contiguous(), scale.contiguous(), table_of(levels, x.device), codes)
    kind = KINDS[levels.name]
    numbers = (n, k, grid_cols, n // grid_rows, k // grid_cols, kind, block_n, block_k)
    launch(_encode, (-(-n // block_n), -(-k // block_k), 1), tensors, *numbers, num_warps=4)
    return codes


@triton.jit
def _pack(codes, out, count, HIGH_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    pair = tl.load(codes + at, inside, other=0).to(tl.int32)  # the even code in the low byte
    even, odd = pair & 15, (pair >> 8) & 15
    tl.store(
        out + at, ((even << 4) | odd if HIGH_FIRST else even | (odd << 4)).to(tl.uint8), inside
    )


def pack(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    """(N, K) one code per byte -> (N, K/2) uint8."""
    n, k = codes.shape
    out = torch.empty((n, k // 2), dtype=torch.uint8, device=codes.device)
    pairs = codes.contiguous().view(torch.int16)
    launch(
        _pack,
        (-(-out.numel() // 4096), 1, 1),
        (pairs, out),
        out.numel(),
        high_first,
        4096,
        num_warps=4,
    )
    return out
