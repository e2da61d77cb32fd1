"""Quantize weights: the largest magnitude of each tile, codes under given scales, nibbles packed. Bits as eager's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rounding import divide, divide_many, magnitude, round_int8
from .tiles import block_columns


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


def _runs(x: torch.Tensor, count: int, size: int) -> torch.Tensor:
    out = torch.empty(count, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(size), 1024)
    runs = 4096 // block
    with torch.cuda.device(x.device):
        _run_absmax[(triton.cdiv(count, runs),)](x, out, count, size, runs, block, num_warps=4)
    return out


def absmax(x: torch.Tensor, rows: int | None, cols: int | None) -> torch.Tensor:
    """(N, K) -> float32 absmax of every tile of rows x cols (None: the whole extent); NaN where a tile holds NaN."""
    n, k = x.shape
    x = x.contiguous()
    if rows == 1:
        return _runs(x, x.numel() // (cols or k), cols or k).view(n, -1)
    if rows is None:
        whole = x.numel() // 8192 * 8192
        parts = [_runs(x, whole // 8192, 8192)] if whole else []
        if whole < x.numel():
            parts.append(_runs(x.view(-1)[whole:], 1, x.numel() - whole))
        return torch.cat(parts).amax().view(1, 1)
    out = torch.empty((n // rows, k // cols), dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        _tile_absmax[(n // rows, k // cols)](x, out, k, rows, cols, min(rows, max(4096 // cols, 1)), num_warps=4)
    return out


@triton.jit
def _rank16(x, T: tl.constexpr):
    """How many of 15 ascending thresholds lie strictly below x, by bisection."""
    a = x > T[7]
    b = x > tl.where(a, T[11], T[3])
    c = x > tl.where(a, tl.where(b, T[13], T[9]), tl.where(b, T[5], T[1]))
    low = tl.where(b, tl.where(c, T[6], T[4]), tl.where(c, T[2], T[0]))
    high = tl.where(b, tl.where(c, T[14], T[12]), tl.where(c, T[10], T[8]))
    d = x > tl.where(a, high, low)
    return a.to(tl.int32) * 8 + b.to(tl.int32) * 4 + c.to(tl.int32) * 2 + d.to(tl.int32)


@triton.jit
def _rank8(x, T: tl.constexpr):
    """The same for 7 thresholds."""
    a = x > T[3]
    b = x > tl.where(a, T[5], T[1])
    c = x > tl.where(a, tl.where(b, T[6], T[4]), tl.where(b, T[2], T[0]))
    return a.to(tl.int32) * 4 + b.to(tl.int32) * 2 + c.to(tl.int32)


@triton.jit
def _encode(
    x, scale, codes, n, k, grid_cols, tile_rows, tile_cols,
    KIND: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows[:, None] < n) & (cols[None, :] < k)
    at = rows[:, None] * k + cols[None, :]
    value = tl.load(x + at, inside, other=0.0).to(tl.float32)
    # A program's columns lie in one tile, so each of its rows has one scale.
    s = tl.load(scale + rows // tile_rows * grid_cols + tl.program_id(1) * BK // tile_cols, rows < n, other=1.0)
    s = s[:, None]
    inverse = divide(1.0, s)
    if KIND == 0:
        q = round_int8(divide_many(value, s, inverse))
    else:
        value *= inverse
        if KIND == 1:
            q = tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.float8e4nv)
        elif KIND == 2:
            q = _rank16(value, T).to(tl.uint8)
        else:
            rank = _rank8(tl.abs(value), T)
            q = ((rank ^ ((rank & 2) << 1)) + tl.where(value < 0, 8, 0)).to(tl.uint8)
    tl.store(codes + at, q, inside)


KINDS = {"int8": 0, "e4m3fn": 1, "nf4": 2, "fp4": 3}


def encode(
    x: torch.Tensor, scale: torch.Tensor, name: str, dtype: torch.dtype, thresholds: tuple[float, ...]
) -> torch.Tensor:
    """(N, K) floats, scales as a grid over it -> (N, K) codes of the levels `name`, nearest with ties as theirs."""
    n, k = x.shape
    x = x.contiguous()
    grid_rows, grid_cols = scale.shape
    codes = torch.empty((n, k), dtype=dtype, device=x.device)
    block_k = block_columns(k, k // grid_cols)
    block_n = 2048 // block_k
    with torch.cuda.device(x.device):
        _encode[(triton.cdiv(n, block_n), triton.cdiv(k, block_k))](
            x, scale.contiguous(), codes, n, k, grid_cols, n // grid_rows, k // grid_cols,
            KIND=KINDS[name], T=thresholds, BN=block_n, BK=block_k, num_warps=4,
        )  # fmt: skip
    return codes


@triton.jit
def _pack(codes, out, count, HIGH_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    pair = tl.load(codes + at, inside, other=0).to(tl.int32)  # the even code in the low byte
    even, odd = pair & 15, (pair >> 8) & 15
    tl.store(out + at, ((even << 4) | odd if HIGH_FIRST else even | (odd << 4)).to(tl.uint8), inside)


def pack(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    """(N, K) one code per byte -> (N, K/2) uint8."""
    n, k = codes.shape
    out = torch.empty((n, k // 2), dtype=torch.uint8, device=codes.device)
    with torch.cuda.device(codes.device):
        _pack[(triton.cdiv(out.numel(), 4096),)](
            codes.contiguous().view(torch.int16), out, out.numel(), high_first, 4096, num_warps=4
        )
    return out
