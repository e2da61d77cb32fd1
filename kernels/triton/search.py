"""The best of many scales for each group of a 4-bit weight, from a table of errors. Bits as
eager's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch
from .rounding import divide, nearest_even, product

# Groups and warps of a program. Milliseconds for 12288x3072 as NF4 and 88 factors on an H200: 1.11;
# from 4 groups on one warp to 16 on 8 1.11 to 1.19. The rows add up to 13 GB, mostly from the GPU's
# second-level cache. Eager 7.2.
RUNS, WARPS = 8, 4


@triton.jit
def _lowest_error(
    x, scale, table, best, groups, count,
    BINS: tl.constexpr, FACTORS: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Rows of the table are read whole and added up; integers below 2^24 have exact sums."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    inside = run < groups
    inverse = divide(1.0, tl.load(scale + run, inside, 1.0))
    factor = tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros((RUNS, WIDTH), dtype=tl.float32)
    for element in range(count):
        w = tl.load(x + run * count + element, inside, 0.0).to(tl.float32)
        bin = product(product(w, inverse) + 1.0, (BINS - 1) / 2)
        bin = tl.minimum(tl.maximum(nearest_even(bin).to(tl.int32), 0), BINS - 1)[:, None]
        sums += tl.load(table + bin * FACTORS + factor, factor < FACTORS, 0.0)
    sums = tl.where(factor < FACTORS, sums, float("inf"))
    lowest = tl.min(sums, 1)[:, None]
    tl.store(best + run, tl.min(tl.where(sums == lowest, factor, WIDTH), 1), inside)


def lowest_error(x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Groups (n, count), their scales (n, 1) and errors (bins, factors) -> (n,) int32, the first
    factor of the best.
    """
    n, count = x.shape
    bins, factors = table.shape
    best = torch.empty(n, dtype=torch.int32, device=x.device)
    tensors = (x.contiguous(), scale.contiguous(), table, best)
    numbers = (n, count, bins, factors, triton.next_power_of_2(factors), RUNS)
    launch(_lowest_error, (-(-n // RUNS), 1, 1), tensors, *numbers, num_warps=WARPS)
    return best
