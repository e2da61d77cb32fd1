"""4-bit codes with one absmax per group of the flattened weight: dequantize, and x @ W.T without writing W.

w[n, k] = table[code] * absmax[(n * K + k) // g]; two codes per byte, the high nibble first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .lut import table_asm


@triton.jit
def _dequantize(
    packed, absmax, out, count, HALF_GROUP: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr, SPEC: tl.constexpr
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < count - base
    byte = tl.load(packed + base + index, inside, other=0)
    high, low = tl.inline_asm_elementwise(ASM, SPEC, [byte], dtype=(tl.float32, tl.float32), is_pure=True, pack=4)
    # BLOCK is a multiple of every group, so the group is found inside the block
    scale = tl.load(absmax + base // HALF_GROUP + index // HALF_GROUP, inside, other=0.0)
    pair = tl.join(high * scale, low * scale).to(out.dtype.element_ty)
    at = tl.arange(0, 2 * BLOCK)
    tl.store(out + 2 * base + at, tl.reshape(pair, (2 * BLOCK,)), at < 2 * (count - base))


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, values: tuple[float, ...], group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K/2) uint8 -> (N, K) `dtype`: the float32 product, rounded once; `values` by code."""
    n, half = packed.shape
    packed = packed.contiguous()
    out = torch.empty((n, 2 * half), dtype=dtype, device=packed.device)
    block = 2048
    asm, spec = table_asm(values, torch.float32)
    with torch.cuda.device(packed.device):
        _dequantize[(triton.cdiv(packed.numel(), block),)](
            packed,
            absmax,
            out,
            packed.numel(),
            HALF_GROUP=group_size // 2,
            BLOCK=block,
            ASM=asm,
            SPEC=spec,
            num_warps=8,
        )
    return out


@triton.jit
def _linear(
    x, packed, absmax, bias, out, m, n, half, per_split,
    HALF_GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, SPLIT: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    # One program: BM rows of x, BN rows of W, one of SPLIT runs of bytes along K. BH bytes lie in one group.
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    col_inside, row_inside = cols < n, rows < m
    dtype = x.dtype.element_ty
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    start = part * per_split
    stop = tl.minimum(start + per_split, half)
    at = tl.arange(0, BH)
    byte_at = packed + cols[:, None].to(tl.int64) * half + at[None, :]
    x_at = x + rows[:, None].to(tl.int64) * (2 * half) + 2 * at[None, :]
    scale_at = absmax + cols.to(tl.int64) * (half // HALF_GROUP)
    for offset in range(start, stop, BH):
        byte = tl.load(byte_at + offset, col_inside[:, None], other=0)
        high, low = tl.inline_asm_elementwise(ASM, SPEC, [byte], dtype=(dtype, dtype), is_pure=True, pack=4)
        scale = tl.load(scale_at + offset // HALF_GROUP, col_inside, other=0.0)
        even = tl.load(x_at + 2 * offset, row_inside[:, None], other=0.0)
        odd = tl.load(x_at + 2 * offset + 1, row_inside[:, None], other=0.0)
        group = tl.dot(even, tl.trans(high))
        group = tl.dot(odd, tl.trans(low), group)
        sums += group * scale[None, :]
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


# (rows of x and of W per program, bytes of K per step, warps, stages, largest split): fastest of a sweep on an H200
# (tests/benchmarks/linear4.py --sweep; NF4, g 64). 12288x3072, M=16: 0.026 ms, the next best rows of W 0.032;
# dequantize + matmul takes 0.049. From M=64 on the fused kernel loses (0.121 against 0.049). At M=1 a kernel without
# tensor cores took 0.026, this one 0.020.
TILE = (16, 128, 32, 4, 3, 8)
PROGRAMS_PER_SM = 4


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    values: tuple[float, ...],
    group_size: int,
    bias: torch.Tensor | None,
    tile: tuple[int, ...] = TILE,
) -> torch.Tensor:
    """(M, K) @ (N, K).T + bias -> (M, N) of x's dtype.

    Codes are looked up in x's dtype, products accumulate in float32, absmax multiplies each group's float32 sum; split
    along K where M and N are small. K must be a multiple of `group_size`.
    """
    m, k = x.shape
    n, half = packed.shape
    x, packed = x.contiguous(), packed.contiguous()
    block_m, block_n, block_h, warps, stages, most = tile
    block_h = min(block_h, group_size // 2)
    row_programs = triton.cdiv(m, block_m)
    programs = triton.cdiv(n, block_n) * row_programs
    wanted = PROGRAMS_PER_SM * torch.cuda.get_device_properties(x.device).multi_processor_count
    split = 1
    while split < most and programs * split * 2 <= wanted and half // (split * 2) >= 2 * block_h:
        split *= 2
    whole_groups = group_size // 2
    per_split = triton.cdiv(triton.cdiv(half, split), whole_groups) * whole_groups
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    parts = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    has_bias = bias is not None
    asm, spec = table_asm(values, x.dtype)
    with torch.cuda.device(x.device):
        _linear[(triton.cdiv(n, block_n), row_programs, split)](
            x, packed, absmax, bias if has_bias else x, parts, m, n, half, per_split, HALF_GROUP=group_size // 2,
            BM=block_m, BN=block_n, BH=block_h, SPLIT=split, BIAS=has_bias, ASM=asm, SPEC=spec,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if split > 1:
            block = 1024 if m * n >= 1 << 16 else 256
            _reduce[(triton.cdiv(m * n, block),)](
                parts, bias if has_bias else x, out, m, n, SPLIT=split, BIAS=has_bias, BLOCK=block, num_warps=4
            )
    return out
