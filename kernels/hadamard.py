"""ConvRot: each run of G columns of each row times H_G = (H4 x H4 x ...) / sqrt(G), as butterflies
of fixed order.

H4 = [[1,1,1,-1],[1,1,-1,1],[1,-1,1,1],[-1,1,1,1]]. H_G is symmetric and orthogonal: rotating twice
gives the input back. A matrix product would sum in library order, and in TF32 on some GPUs; stored
bytes may not depend on that.
"""

from __future__ import annotations

import torch

from .dispatch import op
from .scales import CHUNK_ELEMENTS, chunk_rows
from .triton import why_not_double, why_not_triton


def is_group_size(group: int) -> bool:
    """True for the powers of 4 that files may name, 4 to 1024."""
    return group in (4, 16, 64, 256, 1024)


@op
def rotate(weight: torch.Tensor, group: int) -> torch.Tensor:
    """R[n, i] = sum over j of W[n, j] H_G[i, j] within each run of G columns; its own inverse.

    Args:
        weight: (N, K) float tensor, K a multiple of `group`; widened to float32 first (float64 is
            rounded once).
        group: G, a power of 4.

    Returns:
        (N, K) float32, a new tensor; each sum is rounded in the order of `_butterfly_`, on every
        device.
    """
    n, k = weight.shape
    out = torch.empty((n, k), dtype=torch.float32, device=weight.device)
    rows = chunk_rows(CHUNK_ELEMENTS, k, weight.device)
    for start in range(0, n, rows):
        part = out[start : start + rows]
        part.copy_(weight[start : start + rows])
        _butterfly_(part, group)
    return out


def _why_not_triton(weight: torch.Tensor, group: int) -> str | None:
    return why_not_double(weight) or why_not_triton(weight)


@rotate.backend("triton", _why_not_triton)
def _rotate(weight, group):
    from .triton import hadamard

    return hadamard.rotate(weight, group)


def _butterfly_(x: torch.Tensor, group: int) -> None:
    """log4(G) stages with stride 1, 4, 16, ..., then the exact factor 1 / sqrt(G). `x` is
    contiguous float32.
    """
    stride, factor = 1, 1.0
    while stride < group:
        x0, x1, x2, x3 = x.view(-1, 4, stride).unbind(1)
        p, q, r, t = x0 + x1, x2 - x3, x0 - x1, x2 + x3
        torch.add(p, q, out=x0)
        torch.sub(p, q, out=x1)
        torch.add(r, t, out=x2)
        torch.sub(t, r, out=x3)
        stride, factor = stride * 4, factor * 0.5
    x.mul_(factor)
