"""gptq: codes that lie for each other. Columns are rounded one after the other, and each error is
made good by the columns still to come, as far as the layer's inputs have them in common. Needs a
calibration.

The objective is ||X E^T||, E = Q - W, over the calibration's rows X. What repeats only within the
calibration is damped away: `inputs.best_damping` asks one half of it about the other.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323 (feedback through the inverse
gram); the passes after it are coordinate descent on the same objective.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.columns import Columns
from ...kernels.grids import Grid, Scale
from ...kernels.scales import TINY
from ..options import Options
from .base import Layer, Method, Objective, register_method
from .inputs import best_damping, damped, upper_root
from .scales import WORTH_A_SCALE, BestScales

BLOCK = 128  # columns between two products with the whole rest
# Factors of the absmax scale, in octaves: 4-bit groups clip to about .7, uneven grids gain above 1.
LOWEST, HIGHEST, PER_OCTAVE = -1.125, 0.5, 8


@dataclass(frozen=True)
class GptqOptions(Options):
    """`passes` of coordinate descent after the feedback (emoji model, output error on other
    prompts, x nearest's: fp8 .719 without, .693 with three; nf4 .663 and .646). `damping` x the
    mean second moment; 0 chooses it by the two halves of the calibration.
    """

    passes: int = 3
    damping: float = 0.0

    ranges: ClassVar = {"passes": (0, 100), "damping": (0.0, 1000.0)}


class Gptq(Method):
    name = "gptq"
    Options = GptqOptions
    needs_inputs = True

    def quantize(self, layer: Layer) -> tuple[torch.Tensor, Scale, Objective]:
        weight, grid, options = layer.weight.float(), layer.grid, layer.options
        inputs = layer.inputs.unit()
        gram = inputs.gram
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        damping = options.damping or best_damping(inputs, order)
        gram = damped(gram, damping)
        scale = felt_scale(layer, weight, gram.diagonal())
        work = _Columns(layer, weight, scale, order)
        ordered = gram[order][:, order]
        work.feed_back(ordered)
        for _ in range(options.passes):
            if not work.descend(ordered):
                break

        def objective(codes: torch.Tensor, scale: Scale) -> float:
            error = grid.decode(codes, scale) - weight
            return float((error @ gram).mul_(error).sum(dtype=torch.float64).sqrt())

        return work.codes(), scale, objective


def felt_scale(layer: Layer, weight: torch.Tensor, strength: torch.Tensor) -> Scale:
    """The scale of every region whose error is felt least, that is where inputs are strong, if it
    gains enough; else nearest's.

    Args:
        weight: (N, K) float32.
        strength: (K,) second moment of each input channel.
    """
    grid = layer.grid
    start = grid.scale(weight)

    def errors(scale: Scale) -> torch.Tensor:
        layer.step()
        difference = grid.decode(grid.encode(weight, scale), scale).sub_(weight)
        return grid.region_sums(difference.square_().mul_(strength))

    plain = errors(start)
    best = BestScales(grid, (start, plain), errors)
    for factor in _factors(grid):
        best.attempt(grid.rescaled(start, factor))
    return best.scale if best.errors.sum() <= WORTH_A_SCALE**2 * plain.sum() else start


def _factors(grid: Grid) -> Iterator[float]:
    step = max(1 / PER_OCTAVE, grid.scale_step)
    for index in range(round(LOWEST / step), round(HIGHEST / step) + 1):
        if index:
            yield 2.0 ** (index * step)


class _Columns:
    """A weight being rounded, transposed and in the order of work: row i is column `order[i]`.

    Grams come in that order.
    """

    def __init__(self, layer: Layer, weight: torch.Tensor, scale: Scale, order: torch.Tensor):
        self.layer, self.scale, self.order = layer, scale, order
        self.shape = tuple(weight.shape)
        self.weight = weight.t()[order].contiguous()
        plain = layer.grid.encode(weight, scale)
        self.dtype = plain.dtype
        self.found = plain.view(torch.uint8).t()[order].contiguous()
        self.values = torch.empty_like(self.weight)
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

    def feed_back(self, gram: torch.Tensor) -> None:
        """Round each column; the later ones make its error good."""
        root = upper_root(gram)
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

    def descend(self, gram: torch.Tensor) -> bool:
        """One pass of coordinate descent; whether any code changed."""
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


register_method(Gptq())
