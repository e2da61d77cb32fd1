"""What methods with a calibration minimise: ||X E^T||, E = Q - W, over the calibration's rows X.
What repeats only within the calibration is damped away: `inputs.best_damping` asks one half of it
about the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.grids import Grid, Scale
from .base import Layer
from .inputs import best_damping, damped
from .scales import WORTH_A_SCALE, BestScales

# Factors of the absmax scale, in octaves: 4-bit groups clip to about .7, uneven grids gain above 1.
LOWEST, HIGHEST, PER_OCTAVE = -1.125, 0.5, 8


class Felt:
    """A layer's weight beside what its inputs let show.

    Attributes:
        weight: (N, K) float32.
        gram: (K, K) float32, the damped mean of x^T x, in a unit in which float32 holds products.
        order: (K,) the columns by their strength, strongest first.
        scale: that of every region whose error is felt least.
    """

    def __init__(self, layer: Layer, damping: float):
        inputs = layer.inputs.unit()
        gram = inputs.gram
        self.grid, self.weight = layer.grid, layer.weight.float()
        self.order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        self.gram = damped(gram, damping or best_damping(inputs))
        self.scale = felt_scale(layer, self.weight, self.gram.diagonal())

    def objective(self, codes: torch.Tensor, scale: Scale) -> float:
        error = self.grid.decode(codes, scale) - self.weight
        return float((error @ self.gram).mul_(error).sum(dtype=torch.float64).sqrt())


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
