"""4-bit codes with one absmax per group of the flattened weight: dequantize, and x @ W.T without writing W.

w[n, k] = round(table[code] * absmax[(n * K + k) // g]); two codes per byte, the high nibble first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _dequantize(packed, absmax, table, out, count, group, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    byte = tl.load(packed + index, inside, other=0).to(tl.int32)
    # both codes of a byte lie in one group, because group sizes are even
    scale = tl.load(absmax + (2 * index) // group, inside, other=0.0)
    high = tl.load(table + (byte >> 4)) * scale
    low = tl.load(table + (byte & 15)) * scale
    pair = tl.join(high, low).to(out.dtype.element_ty)
    at = (2 * tl.program_id(0).to(tl.int64)) * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out + at, tl.reshape(pair, (2 * BLOCK,)), at < 2 * count)


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K/2) uint8 -> (N, K) `dtype`; `table` (16,) float32."""
    n, half = packed.shape
    packed = packed.contiguous()
    out = torch.empty((n, 2 * half), dtype=dtype, device=packed.device)
    block = 1024
    with torch.cuda.device(packed.device):
        _dequantize[(triton.cdiv(packed.numel(), block),)](
            packed, absmax, table, out, packed.numel(), group_size, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def _linear(
    x, packed, absmax, table, bias, out, m, n, half, per_split,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    # One program: BM rows of x, BN rows of W, one of SPLIT runs of bytes along K.
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    col_inside, row_inside = cols < n, rows < m
    dtype = x.dtype.element_ty
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    start = part * per_split
    stop = tl.minimum(start + per_split, half)
    for offset in range(start, stop, BH):
        at = offset + tl.arange(0, BH)
        inside = at < stop
        mask = col_inside[None, :] & inside[:, None]
        byte = tl.load(packed + cols[None, :].to(tl.int64) * half + at[:, None], mask, other=0).to(tl.int32)
        group = (cols[None, :].to(tl.int64) * half + at[:, None]) // (GROUP // 2)
        scale = tl.load(absmax + group, mask, other=0.0)
        high = (tl.load(table + (byte >> 4)) * scale).to(dtype)
        low = (tl.load(table + (byte & 15)) * scale).to(dtype)
        x_mask = row_inside[:, None] & inside[None, :]
        x_at = x + rows[:, None].to(tl.int64) * (2 * half) + 2 * at[None, :]
        sums = tl.dot(tl.load(x_at, x_mask, other=0.0), high, sums)
        sums = tl.dot(tl.load(x_at + 1, x_mask, other=0.0), low, sums)
    out_at = rows[:, None].to(tl.int64) * n + cols[None, :]
    out_mask = row_inside[:, None] & col_inside[None, :]
    if SPLIT == 1:
        if BIAS:
            sums += tl.load(bias + cols, col_inside, other=0.0).to(tl.float32)[None, :]
        tl.store(out + out_at, sums.to(out.dtype.element_ty), out_mask)
    else:
        tl.store(out + part.to(tl.int64) * m * n + out_at, sums, out_mask)


@triton.jit
def _reduce(parts, bias, out, m, n, SPLIT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < m * n
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):  # always in this order: equal inputs give equal sums
        sums += tl.load(parts + part * m * n + at, inside, other=0.0)
    if BIAS:
        sums += tl.load(bias + at % n, inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), inside)


# (largest M, BM, BN, bytes of K per step, warps, stages); the first row whose M fits. Swept by
# tests/benchmarks/linear4.py on an H200.
TILES = ((16, 16, 32, 64, 4, 4), (32, 32, 64, 64, 4, 3), (64, 64, 64, 64, 4, 3), (1 << 30, 64, 128, 32, 8, 3))
PROGRAMS_PER_SM = 4


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
    tile: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """(M, K) @ (N, K).T + bias -> (M, N) of x's dtype; float32 accumulation, split along K where M and N are small.

    K must be a multiple of `group_size`.
    """
    m, k = x.shape
    n, half = packed.shape
    x, packed = x.contiguous(), packed.contiguous()
    _, block_m, block_n, block_h, warps, stages = tile or next(row for row in TILES if m <= row[0])
    programs = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    wanted = PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count
    split = 1
    while split < 16 and programs * split * 2 <= wanted and half // (split * 2) >= 2 * block_h:
        split *= 2
    per_split = triton.cdiv(triton.cdiv(half, split), block_h) * block_h
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, block_n), triton.cdiv(m, block_m), split)
    has_bias = bias is not None
    with torch.cuda.device(x.device):
        _linear[grid](
            x, packed, absmax, table, bias if has_bias else x, parts, m, n, half, per_split, GROUP=group_size,
            BM=block_m, BN=block_n, BH=block_h, SPLIT=split, BIAS=has_bias, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if split > 1:
            block = 1024 if m * n >= 1 << 16 else 256
            _reduce[(triton.cdiv(m * n, block),)](
                parts, bias if has_bias else x, out, m, n, SPLIT=split, BIAS=has_bias, BLOCK=block, num_warps=4
            )
    return out
