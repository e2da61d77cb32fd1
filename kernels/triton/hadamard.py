"""ConvRot's rotation in registers: the butterflies of `kernels/hadamard.py`, in the same order.
Bits as eager's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

# Elements and warps of a program. Milliseconds for 12288x3072 bf16 rotated by 256 on an H200: .092;
# 2048 to 16384 elements on 4 or 8 warps .110 to .120, eager 1.9.
SIZE, WARPS = 4096, 4


@triton.jit
def _stage(value, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    # Element 2 * j1 + j0 of each four, STRIDE apart; j0 comes last to be split off, then j1.
    fours = tl.permute(tl.reshape(value, (SIZE // (4 * STRIDE), 2, 2, STRIDE)), (0, 3, 1, 2))
    even, odd = tl.split(fours)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    p, q, r, t = x0 + x1, x2 - x3, x0 - x1, x2 + x3
    fours = tl.join(tl.join(p + q, p - q), tl.join(r + t, t - r))  # (..., STRIDE, j0, j1)
    return tl.reshape(tl.permute(fours, (0, 3, 2, 1)), (SIZE,))


@triton.jit
def _rotate(x, out, count, STAGES: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, at < count, 0.0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        value = _stage(value, 4**stage, SIZE)
    tl.store(out + at, value * 0.5**STAGES, at < count)


def rotate(x: torch.Tensor, group: int) -> torch.Tensor:
    """(N, K) floats -> (N, K) float32, rotated `group` by `group`."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    stages = (group.bit_length() - 1) // 2
    grid = (-(-x.numel() // SIZE), 1, 1)
    launch(_rotate, grid, (x.contiguous(), out), x.numel(), stages, SIZE, num_warps=WARPS)
    return out
