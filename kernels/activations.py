"""Activations to 8 bits while the model runs: per token, or per token and K-group; scale = absmax /
qmax.

Grid and rounding are the weights' own (kernels/grids.py): ties to even, zero rows decode to exact
zeros. A row or group that holds NaN or infinity gets a scale that is not finite, so that its
products show it.
"""

from __future__ import annotations

import torch

from .dispatch import op
from .grids import TiledGrid
from .levels import Levels
from .scales import Geometry
from .triton import why_not_codes_of


@op
def quantize_activations(
    x: torch.Tensor, levels: Levels, group: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of x, or each run of `group` elements of a row.

    Args:
        x: (M, K) float32, float16 or bfloat16; K a multiple of `group`.
        levels: INT8 or E4M3.
        group: elements along K that share a scale; None for the whole row.

    Returns:
        codes: (M, K) `levels.dtype`.
        scale: (M, K / group) float32, (M, 1) without groups; M is its fastest dimension in memory,
            as matmuls read it.
    """
    grid = TiledGrid(levels, Geometry(1, group))
    scale = grid.scale(x)
    return grid.encode(x, scale), scale.t().contiguous().t()


def _why_not(x: torch.Tensor, levels: Levels, group: int | None) -> str | None:
    if group is not None and group & (group - 1):
        return f"group of {group} is no power of two"
    return why_not_codes_of(x, levels.dtype)


@quantize_activations.backend("triton", _why_not)
def _quantize_activations(x, levels, group):
    from .triton import activations

    return activations.quantize(x, levels, group)
