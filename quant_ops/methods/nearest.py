"""nearest: scale = absmax / qmax, each weight to the closest code, ties to even. Needs no data."""

from __future__ import annotations

import torch

from ...kernels.grids import Grid, Scale
from .base import register_method


class Nearest:
    name = "nearest"

    def quantize(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Scale]:
        scale = grid.scale(weight)
        return grid.encode(weight, scale), scale


register_method(Nearest())
