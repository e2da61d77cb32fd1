"""Columns of a weight under fixed scales, rounded one at a time: what methods need that choose each
column's codes after the errors of the columns before it.

Everything is transposed: a column is one contiguous row of N values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .levels import Levels


class Columns(Protocol):
    """Some columns of one weight."""

    def nearest(self, column: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round a column.

        Args:
            column: which of these columns.
            x: (N,) float32, what the column should be; not changed.

        Returns:
            codes: (N,) as the grid's own `encode` would give for x, zero regions excepted.
            values: (N,) float32, the codes decoded.
        """


@dataclass(frozen=True)
class LevelColumns:
    """Columns whose values are levels times a scale: `scale` is (columns, N), or (columns, 1) where
    all rows share it. A scale of 0 decodes to 0 whatever the code.
    """

    levels: Levels
    scale: torch.Tensor

    def nearest(self, column: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scale[column]
        divisor = torch.where(scale == 0, 1.0, scale)
        codes = self.levels.round_(self.levels.normalise_(x.clone(), divisor)).to(self.levels.dtype)
        return codes, self.levels.widen(codes).mul_(scale)


@dataclass(frozen=True)
class TableColumns:
    """Columns with a table of values for each element: `values` is (columns, codes, N), ascending
    along the codes; ties go to the lower one. `unit` (N,) multiplies all of a row.
    """

    values: torch.Tensor
    unit: torch.Tensor

    def nearest(self, column: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.values[column]
        codes = (table - x / self.unit).abs_().argmin(0, keepdim=True)
        return codes[0].to(torch.uint8), table.gather(0, codes)[0] * self.unit
