"""Dequantize 4-bit codes with one absmax per group of the flattened weight.

w[n, k] = table[code] * absmax[(n * K + k) // g]; two codes per byte, the high nibble first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .lut import table_asm


@triton.jit
def _dequantize(
    packed,
    absmax,
    out,
    count,
    HALF_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
    SPEC: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = index < count - base
    byte = tl.load(packed + base + index, inside, other=0)
    high, low = tl.inline_asm_elementwise(
        ASM, SPEC, [byte], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
    )
    # BLOCK is a multiple of every group, so the group is found inside the block
    scale = tl.load(absmax + base // HALF_GROUP + index // HALF_GROUP, inside, other=0.0)
    pair = tl.join(high * scale, low * scale).to(out.dtype.element_ty)
    at = tl.arange(0, 2 * BLOCK)
    tl.store(out + 2 * base + at, tl.reshape(pair, (2 * BLOCK,)), at < 2 * (count - base))


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    values: tuple[float, ...],
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(N, K/2) uint8 -> (N, K) `dtype`: the float32 product, rounded once; `values` by code."""
    n, half = packed.shape
    packed = packed.contiguous()
    out = torch.empty((n, 2 * half), dtype=dtype, device=packed.device)
    block, count = 2048, packed.numel()
    constants = (group_size // 2, block, *table_asm(values, torch.float32))
    launch(
        _dequantize,
        (-(-count // block), 1, 1),
        (packed, absmax, out),
        count,
        *constants,
        num_warps=8,
    )
    return out
