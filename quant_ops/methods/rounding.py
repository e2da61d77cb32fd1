"""Codes chosen column by column, each for the errors of the columns before it or beside it: what
methods with a calibration share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.columns import MOST_COLUMNS, Columns, Sweep
from ...kernels.scales import TINY
from .base import Layer
from .felt import Felt
from .inputs import upper_root


class Rounding:
    """A weight being rounded, transposed and in the order of work: row i is column `felt.order[i]`.

    It starts from the codes given; without, `feed_back` finds the first ones.
    """

    def __init__(self, layer: Layer, felt: Felt, codes: torch.Tensor | None = None):
        self.layer, self.scale, self.order = layer, felt.scale, felt.order
        self.shape = tuple(felt.weight.shape)
        self.weight = self._ordered(felt.weight)
        self.gram = felt.gram[self.order][:, self.order]
        self.values = None if codes is None else self._ordered(layer.grid.decode(codes, self.scale))
        if codes is None:
            codes = layer.grid.encode(felt.weight, self.scale)
        self.dtype = codes.dtype
        self.found = self._ordered(codes.view(torch.uint8))
        zero = self.weight.abs() < TINY  # zeros and padding keep their code
        self.zero = zero if bool(zero.any()) else None

    def _ordered(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t()[self.order].contiguous()

    def codes(self) -> torch.Tensor:
        """(N, K) codes in the columns' own order."""
        result = torch.empty_like(self.found)
        result[self.order] = self.found
        return result.t().contiguous().view(self.dtype)

    def _blocks(self) -> Iterator[tuple[slice, Columns, tuple[torch.Tensor, ...]]]:
        """Each part of the columns, with its `zero` and `kept` of a Sweep where there are any."""
        for start in range(0, len(self.order), MOST_COLUMNS):
            self.layer.step()
            part = slice(start, min(start + MOST_COLUMNS, len(self.order)))
            columns = self.layer.grid.columns(self.scale, self.order[part], self.shape)
            if self.zero is None:
                yield part, columns, ()
            else:
                yield part, columns, (self.zero[part], self.found[part])

    def feed_back(self) -> None:
        """Round each column, wanting it where it makes the errors of those before it good.

        With gram = U D U^T, U unit upper triangular, the objective of errors E is ||E U D^1/2||,
        and (E U)_j is what rounding column j misses if it is wanted at w_j - sum_{i<j} E_i U_ij.
        """
        root = upper_root(self.gram)
        if root is None:
            raise ValueError("the second moments of the inputs are not positive definite")
        unit = root.div_(root.diagonal().clone())
        self.values = torch.empty_like(self.weight)
        missed = torch.zeros_like(self.weight)
        for part, columns, zeros in self._blocks():
            sweep = Sweep(missed[part], unit[part, part], self.weight[part], *zeros)
            swept = columns.sweep(sweep)
            self.found[part], self.values[part] = swept.codes, swept.values
            missed[part.stop :].addmm_(unit[part, part.stop :].T, swept.change)

    def descend(self, passes: int) -> None:
        """Coordinate descent, until nothing changes or these passes are over."""
        slope = self.gram @ (self.values - self.weight) if passes else None
        for _ in range(passes):
            if not self._pass(slope):
                return

    def _pass(self, slope: torch.Tensor) -> bool:
        """Whether any code changed; `slope`, of the objective along the values, is kept up."""
        changed = torch.zeros((), dtype=torch.bool, device=slope.device)
        for part, columns, zeros in self._blocks():
            sweep = Sweep(slope[part], self.gram[part, part], self.values[part], *zeros)
            swept = columns.sweep(sweep)
            changed |= swept.change.any()
            self.found[part], self.values[part] = swept.codes, swept.values
            slope.addmm_(self.gram[:, part], swept.change)
        return bool(changed)
