"""mse_clip: the scale of each region that gives the smallest squared weight error, found by search.
Needs no data.

scale = f * absmax / qmax with f below 1 (the largest weights are clipped, the others get finer
steps) or above 1 (floating-point and uneven grids: the levels move against the weights).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.grids import Scale
from ..options import Options
from .base import Layer, Method, WeightError, register_method
from .scales import BestScales


@dataclass(frozen=True)
class MseClipOptions(Options):
    """The search: multiples of the absmax scale from `lowest` to `highest`, `steps_per_octave` for
    each factor of 2.

    Below 1/2, where the error changes slowly, a quarter as many steps are tried.
    """

    lowest: float = 1 / 16
    highest: float = 2.0
    steps_per_octave: int = 16

    ranges: ClassVar = {"lowest": (2**-10, 1.0), "highest": (1.0, 4.0), "steps_per_octave": (1, 64)}


class MseClip(Method):
    name = "mse_clip"
    Options = MseClipOptions
    in_passes = True

    def quantize(self, layer: Layer) -> tuple[torch.Tensor, Scale, WeightError]:
        scale = search_scale(layer)
        return layer.grid.encode(layer.weight, scale), scale, WeightError()


def search_scale(layer: Layer) -> Scale:
    """The best scale of every region, never worse than absmax's.

    All regions try the same factors one after the other, then refine around their own best; a grid
    that can tell the best of many factors is asked for it, in steps as fine as the refined ones.
    """
    weight, grid, options = layer.weight, layer.grid, layer.options
    step = max(1 / options.steps_per_octave, grid.scale_step)
    start, _ = layer.nearest_errors

    def errors(scale: Scale) -> torch.Tensor:
        layer.step()
        return grid.region_errors(weight, grid.encode(weight, scale), scale)

    best = BestScales(grid, layer.nearest_errors, errors)
    found = grid.best_factors(weight, start, tuple(_factors(options, step / 2, 2 * step)))
    if found is not None:
        best.attempt(grid.rescaled(start, found))
        return best.scale
    for factor in _factors(options, step, max(4 * step, 0.25)):
        best.attempt(grid.rescaled(start, factor))
    for octaves in (2 * step, step, step / 2):
        if octaves >= grid.scale_step:
            centre = best.scale
            for factor in (2**octaves, 2**-octaves):
                best.attempt(grid.rescaled(centre, factor))
    return best.scale


def _factors(options: MseClipOptions, step: float, wide: float) -> Iterator[float]:
    """Multiples of the absmax scale, 1 excepted; `step` in octaves, below 1/2 `wide`."""
    for direction, limit in ((1, options.highest), (-1, options.lowest)):
        octaves = step
        while octaves <= abs(math.log2(limit)) + 1e-9:
            yield 2.0 ** (direction * octaves)
            octaves += wide if direction < 0 and octaves >= 1 - 1e-9 else step


register_method(MseClip())
