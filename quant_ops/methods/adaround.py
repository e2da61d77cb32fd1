"""adaround: each weight takes the code below or above it, whichever of the two the layer's inputs
want. How far it has gone from one to the other is learned by gradient, with a pull to either end
that grows. Needs a calibration; `felt` says what is minimised.

Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, arXiv:2004.10568 (rectified sigmoid,
annealed regulariser). Here the mean of x^T x stands for the rows, so that every row counts in every
step; the scale is `felt_scale`'s; and the codes kept are the best that any step would have given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.grids import Grid, Scale
from ...kernels.scales import TINY
from ..options import Options
from .base import Layer, Method, Objective, register_method
from .felt import Felt
from .rounding import Rounding

# The sigmoid's ends lie this far outside [0, 1], so that both are reached.
STRETCH = 0.1
# The regulariser's exponent: from flat, where only weights near an end are drawn to it, to steep.
FLAT, STEEP = 20.0, 2.0
FREE = 0.2  # share of the steps without any pull
DOUBLINGS = 12  # of a weight's distance to its code, until the next code is found
LOOK_EVERY = 20  # steps between two looks at the codes that would come out


@dataclass(frozen=True)
class AdaroundOptions(Options):
    """`lr` is Adam's; `pull` the regulariser's share, in the error of a weight rounded to nearest.
    `passes` of coordinate descent follow, in which a code may go further than its neighbours.
    `damping` as for gptq.

    Measured on a layer of 128 x 256, objective x nearest's: bnb_nf4 .894 with a pull of .01, .601
    with 1, .550 with 10, .548 with 20. With three passes bnb_nf4 .447, int8 rows .458 and fp8 .417
    (.478 and .675 without); gptq's are .453, .475 and .386.
    """

    num_iter: int = 400
    lr: float = 0.05
    pull: float = 10.0
    passes: int = 3
    damping: float = 0.0

    ranges: ClassVar = {
        "num_iter": (0, 100_000),
        "lr": (1e-6, 10.0),
        "pull": (0.0, 1000.0),
        "passes": (0, 100),
        "damping": (0.0, 1000.0),
    }


class Adaround(Method):
    name = "adaround"
    Options = AdaroundOptions
    needs_inputs = True

    def quantize(self, layer: Layer) -> tuple[torch.Tensor, Scale, Objective]:
        felt = Felt(layer, layer.options.damping)
        work = Rounding(layer, felt, learn(layer, felt))
        work.descend(layer.options.passes)
        return work.codes(), felt.scale, felt.objective


@dataclass(frozen=True)
class Neighbours:
    """The two codes that a weight lies between: `near` is nearest's, `far` beyond the weight.

    Where a weight is 0, exactly on its code, or beyond the last one, both are the same.
    """

    near: torch.Tensor
    far: torch.Tensor
    start: torch.Tensor  # (N, K) float32, near's values
    step: torch.Tensor  # (N, K) float32, from near's to far's

    def taken(self, far: torch.Tensor) -> torch.Tensor:
        codes = torch.where(far, self.far.view(torch.uint8), self.near.view(torch.uint8))
        return codes.view(self.near.dtype)


def neighbours(grid: Grid, weight: torch.Tensor, scale: Scale) -> Neighbours:
    """Look beyond each weight, twice as far each time: nearest's code lies at most half a step
    away, so the first other code that is met is the next one.
    """
    near = grid.encode(weight, scale)
    start = grid.decode(near, scale)
    reach = weight - start
    found = torch.zeros_like(weight, dtype=torch.bool)
    codes, values = near.view(torch.uint8).clone(), start.clone()
    for _ in range(DOUBLINGS):
        probe = grid.encode(start + reach, scale)
        decoded = grid.decode(probe, scale)
        fresh = (decoded != start) & ~found
        codes = torch.where(fresh, probe.view(torch.uint8), codes)
        values = torch.where(fresh, decoded, values)
        found |= fresh
        reach.mul_(2.0)
    zero = weight.abs() < TINY  # zeros and padding keep their code
    codes = torch.where(zero, near.view(torch.uint8), codes)
    return Neighbours(near, codes.view(near.dtype), start, (values - start).masked_fill_(zero, 0.0))


def learn(layer: Layer, felt: Felt) -> torch.Tensor:
    """The codes with the smallest objective that any look has seen; nearest's are the first."""
    weight, options = felt.weight, layer.options
    sides = neighbours(layer.grid, weight, felt.scale)
    step = sides.step
    still = step == 0
    share = ((weight - sides.start) / step.masked_fill(still, 1.0)).clamp_(0.0, 0.5)
    # the sigmoid's argument at which the rectified one is `share`
    place = torch.logit((share + STRETCH) / (1.0 + 2.0 * STRETCH))
    optimizer = torch.optim.Adam([place], lr=options.lr)
    best, best_codes = felt.objective(sides.near, felt.scale), sides.near
    # of one weight in rounding to nearest, so that the pull means the same in every layer
    unit = max(best**2 / max(weight.numel(), 1), TINY)
    for number in range(options.num_iter):
        layer.step()
        curve = torch.sigmoid(place)
        taken = (curve * (1.0 + 2.0 * STRETCH)).sub_(STRETCH)
        inside = (taken > 0.0) & (taken < 1.0)
        taken.clamp_(0.0, 1.0)
        error = torch.addcmul(sides.start, step, taken).sub_(weight)
        slope = (error @ felt.gram).mul_(step).mul_(2.0 / unit)
        slope += options.pull * _pull(taken, number / options.num_iter)
        place.grad = slope.mul_(curve).mul_(1.0 - curve).mul_(inside).masked_fill_(still, 0.0)
        optimizer.step()
        if number % LOOK_EVERY == LOOK_EVERY - 1 or number == options.num_iter - 1:
            codes = sides.taken(place > 0.0)
            objective = felt.objective(codes, felt.scale)
            if objective < best:
                best, best_codes = objective, codes
    return best_codes


def _pull(taken: torch.Tensor, progress: float) -> torch.Tensor | float:
    """The slope of sum(1 - |2 taken - 1|^exponent) at this share of the steps."""
    if progress < FREE:
        return 0.0
    along = (progress - FREE) / (1.0 - FREE)
    exponent = STEEP + (FLAT - STEEP) * (1.0 + math.cos(math.pi * along)) / 2.0
    side = taken.mul(2.0).sub_(1.0)
    return side.abs().pow_(exponent - 1.0).mul_(-2.0 * exponent).mul_(side.sign())


register_method(Adaround())
