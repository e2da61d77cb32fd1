"""The best scale of every region among those tried."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...kernels.grids import Grid, Scale

# A searched scale is used where it brings the error to this or less, x nearest's. Another scale
# rounds every weight anew, and where activations have few directions the output error then falls or
# rises by chance: by 4 % on the emoji model's single_blocks.2.linear2 (int8 row), for a gain of
# 0.2 %. Under nearest's own scale its codes stay, but for those that learning moves. nf4 gains 7 %,
# fp8 rows 8 %; int8 rows and fp8 with one scale gain under 1 %.
WORTH_A_SCALE = 0.95


class BestScales:
    """`scale` is the best so far of every region, `errors` what it leaves there.

    Args:
        start: the scale to begin with, and its errors.
        measured: the error of each region under a scale, shaped as `Grid.region_errors`.
    """

    def __init__(
        self,
        grid: Grid,
        start: tuple[Scale, torch.Tensor],
        measured: Callable[[Scale], torch.Tensor],
    ):
        self.grid, self.measured = grid, measured
        self.scale, self.errors = start

    def attempt(self, scale: Scale) -> None:
        tried = self.measured(scale)
        better = tried < self.errors  # zero regions have no error: they keep their scale
        self.scale = self.grid.chosen(better, scale, self.scale)
        self.errors = torch.where(better, tried, self.errors)
