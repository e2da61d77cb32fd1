"""Dequantize W4A8 codes: levels to the INT8 grid, the rotation as a product with a matrix of signs, the row scale.

Integers up to 127 and their sums over a rotation group are exact in float16 factors and float32 sums, whatever their
order; so the bits are those of butterflies.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..hadamard import rotate
from .launch import launch

COLUMNS = 256  # of a tile
# Milliseconds for 12288x3072 to bf16 on an H200, rotated by 256: .054; 32 rows and 8 warps .060, 64 and 8 .070, 8 and 4
# .060. A copy of the bf16 weight takes .040, eager 2.5.
ROWS, WARPS = 16, 4


@triton.jit
def _dequantize(
    packed, relative, channel, levels, floats, signs, out, n, k,
    SIDE: tl.constexpr, TWICE: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = tl.program_id(1) * COLUMNS
    half = start // 2 + tl.arange(0, COLUMNS // 2)[None, :]
    byte = tl.load(packed + rows * (k // 2) + half, (rows < n) & (half < k // 2), 0).to(tl.int32)
    level = tl.join(tl.load(levels + (byte & 15)), tl.load(levels + (byte >> 4)))
    group = start // 16 + tl.arange(0, COLUMNS // 16)[None, :]
    step = tl.load(relative + rows * (k // 16) + group, (rows < n) & (group < k // 16), 0)
    step = tl.load(floats + step.to(tl.int32))  # GPUs before sm_89 convert no e4m3fn
    value = tl.reshape(level, (ROWS, COLUMNS // 16, 16)) * step[:, :, None]
    value = tl.where(value > 127.0, 127.0, tl.where(value < -127.0, -127.0, value))  # NaN stays
    value = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: the nearest even integer
    across = tl.arange(0, SIDE)
    sign = tl.load(signs + across[:, None] * SIDE + across[None, :])
    sums = tl.dot(tl.reshape(value.to(tl.float16), (ROWS * COLUMNS // SIDE, SIDE)), sign)
    if TWICE:  # H256 is H16 along 16 neighbours, then along every 16th; sums of 16 codes are still exact in float16
        turned = tl.permute(tl.reshape(sums.to(tl.float16), (ROWS, SIDE, SIDE)), (0, 2, 1))
        sums = tl.dot(tl.reshape(turned, (ROWS * SIDE, SIDE)), sign)
        sums = tl.permute(tl.reshape(sums, (ROWS, SIDE, SIDE)), (0, 2, 1))
    scale = tl.load(channel + rows, rows < n, 0.0)
    column = start + tl.arange(0, COLUMNS)[None, :]
    weight = tl.reshape(sums, (ROWS, COLUMNS)) * FACTOR * scale
    tl.store(out + rows * k + column, weight.to(out.dtype.element_ty), (rows < n) & (column < k))


@cache
def _tables(side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(256,) float32 value of each e4m3fn byte; (side, side) float16 rotation, its entries +-1."""
    floats = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return floats.to(device), (rotate(torch.eye(side), side) * side**0.5).to(device, torch.float16)


def dequantize(
    packed: torch.Tensor,
    relative: torch.Tensor,
    channel: torch.Tensor,
    levels: torch.Tensor,
    span: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(N, K/2) bytes, (N, K/16) float8_e4m3fn, (N,) and (16,) float32 -> (N, K) `dtype`, rotated `span` by `span`."""
    n, half = packed.shape
    out = torch.empty((n, 2 * half), dtype=dtype, device=packed.device)
    bytes_of = (tensor.contiguous().view(torch.uint8) for tensor in (packed, relative))
    side = min(span, 64) if span < COLUMNS else 16
    tensors = (*bytes_of, channel.contiguous(), levels.contiguous(), *_tables(side, packed.device), out)
    numbers = (n, 2 * half, side, span > side, span**-0.5, ROWS, COLUMNS)  # powers of two: exact
    launch(_dequantize, (-(-n // ROWS), -(-2 * half // COLUMNS), 1), tensors, *numbers, num_warps=WARPS)
    return out
