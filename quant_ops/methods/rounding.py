"""Codes chosen column by column, each for the errors of the columns before it or beside it: what
methods with a calibration share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.columns import Columns
from ...kernels.scales import TINY
from .base import Layer
from .felt import Felt
from .inputs import upper_root

BLOCK = 128  # columns between two products with the whole rest


class Rounding:
    """A weight being rounded, transposed and in the order of work: row i is column `felt.order[i]`.

    It starts from the codes given, or from nearest's.
    """

    def __init__(self, layer: Layer, felt: Felt, codes: torch.Tensor | None = None):
        self.layer, self.scale, self.order = layer, felt.scale, felt.order
        self.shape = tuple(felt.weight.shape)
        self.weight = felt.weight.t()[self.order].contiguous()
        self.gram = felt.gram[self.order][:, self.order]
        if codes is None:
            codes = layer.grid.encode(felt.weight, felt.scale)
        self.dtype = codes.dtype
        self.found = codes.view(torch.uint8).t()[self.order].contiguous()
        self.values = layer.grid.decode(codes, felt.scale).t()[self.order].contiguous()
        zero = self.weight.abs() < TINY  # zeros and padding keep their code
        self.zero = zero if bool(zero.any()) else None

    def codes(self) -> torch.Tensor:
        """(N, K) codes in the columns' own order."""
        result = torch.empty_like(self.found)
        result[self.order] = self.found
        return result.t().contiguous().view(self.dtype)

    def _blocks(self) -> Iterator[tuple[slice, Columns]]:
        for start in range(0, len(self.order), BLOCK):
            self.layer.step()
            part = slice(start, min(start + BLOCK, len(self.order)))
            yield part, self.layer.grid.columns(self.scale, self.order[part], self.shape)

    def _round(self, columns: Columns, part: slice, column: int, wanted: torch.Tensor) -> None:
        """Take the codes nearest to what a column should be."""
        at = part.start + column
        codes, values = columns.nearest(column, wanted)
        codes = codes.view(torch.uint8)
        if self.zero is not None:
            codes = torch.where(self.zero[at], self.found[at], codes)
            values = values.masked_fill_(self.zero[at], 0.0)
        self.found[at], self.values[at] = codes, values

    def feed_back(self) -> None:
        """Round each column; the later ones make its error good."""
        root = upper_root(self.gram)
        if root is None:
            raise ValueError("the second moments of the inputs are not positive definite")
        size = len(root)
        inverse = torch.linalg.solve_triangular(
            root, torch.eye(size, device=root.device), upper=True
        )
        share = inverse.mul_(root.diagonal()[:, None])  # row i: of i's error, minus, to each later
        wanted = self.weight.clone()
        for part, columns in self._blocks():
            errors = torch.empty_like(wanted[part])
            for column in range(part.stop - part.start):
                at = part.start + column
                self._round(columns, part, column, wanted[at])
                torch.sub(wanted[at], self.values[at], out=errors[column])
                wanted[at + 1 : part.stop].addr_(
                    share[at, at + 1 : part.stop], errors[column], alpha=-1
                )
            wanted[part.stop :].addmm_(share[part, part.stop :].T, errors, alpha=-1)

    def descend(self, passes: int) -> None:
        """Coordinate descent, until nothing changes or these passes are over."""
        for _ in range(passes):
            if not self._pass():
                return

    def _pass(self) -> bool:
        """Whether any code changed."""
        gram = self.gram
        slope = gram @ (self.values - self.weight)
        changed = torch.zeros((), dtype=torch.bool, device=gram.device)
        for part, columns in self._blocks():
            before, local = self.values[part].clone(), slope[part].clone()
            for column in range(part.stop - part.start):
                at = part.start + column
                was = before[column]
                self._round(columns, part, column, was - local[column] / gram[at, at])
                local.addr_(gram[part, at], self.values[at] - was)
            moved = self.values[part] - before
            changed |= moved.any()
            slope.addmm_(gram[:, part], moved)
        return bool(changed)
