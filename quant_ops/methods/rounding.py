"""Codes chosen column by column, each for the errors of the columns before it or beside it: what
methods with a calibration share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.columns import MOST_COLUMNS, Columns, Zeros
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

    def _blocks(self) -> Iterator[tuple[slice, Columns, Zeros | None]]:
        for start in range(0, len(self.order), MOST_COLUMNS):
            self.layer.step()
            part = slice(start, min(start + MOST_COLUMNS, len(self.order)))
            columns = self.layer.grid.columns(self.scale, self.order[part], self.shape)
            zeros = None if self.zero is None else Zeros(self.zero[part], self.found[part])
            yield part, columns, zeros

    def feed_back(self) -> None:
        """Round each column; the later ones make its error good."""
        root = upper_root(self.gram)
        if root is None:
            raise ValueError("the second moments of the inputs are not positive definite")
        size = len(root)
        inverse = torch.linalg.solve_triangular(
            root, torch.eye(size, device=root.device), upper=True
        )
        share = inverse.mul_(root.diagonal()[:, None])  # row i: of i's error, to each later column
        wanted, self.values = self.weight.clone(), torch.empty_like(self.weight)
        for part, columns, zeros in self._blocks():
            swept = columns.sweep(wanted[part], share[part, part], None, zeros)
            self.found[part], self.values[part] = swept.codes, swept.values
            wanted[part.stop :].addmm_(share[part, part.stop :].T, swept.change)

    def descend(self, passes: int) -> None:
        """Coordinate descent, until nothing changes or these passes are over."""
        for _ in range(passes):
            if not self._pass():
                return

    def _pass(self) -> bool:
        """Whether any code changed."""
        slope = self.gram @ (self.values - self.weight)
        changed = torch.zeros((), dtype=torch.bool, device=slope.device)
        for part, columns, zeros in self._blocks():
            swept = columns.sweep(slope[part], self.gram[part, part], self.values[part], zeros)
            changed |= swept.change.any()
            self.found[part], self.values[part] = swept.codes, swept.values
            slope.addmm_(self.gram[:, part], swept.change)
        return bool(changed)
