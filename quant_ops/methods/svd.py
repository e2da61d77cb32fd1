"""svd: learned rounding that clears the error out of the weight's leading singular directions.
Needs no data.

U, V span the k leading singular directions of W, E = Q - W is the error of the codes that will be
stored, and the objective is ||U^T E V||. The optimizer moves a continuous shift of the weight; the
codes are the nearest ones to the shifted weight under the `mse_clip` scale, where that is worth it,
and the gradient U (U^T E V) V^T is taken at these codes. So weights that lie close to the middle
between two codes flip first, which costs least, and what is measured is what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...kernels.grids import Scale
from ...kernels.scales import TINY
from ..options import Options
from .base import Layer, Method, Objective, register_method
from .learning_rate import SCHEDULES, LearningRate
from .mse_clip import MseClipOptions, search_scale
from .scales import WORTH_A_SCALE

# The searched scale is used where it is WORTH_A_SCALE, and no row or column of the weight errs more
# than this many times as much. Clipping a few outliers for finer steps is cheap by the weight's
# error, and dear where just their inputs are strong: of 22 layers of the emoji model in int8 with
# one scale, whose weight error falls to 0.77, the output error of two rises to 2.3 and 2.7.
WORST_CHANNEL = 2.0

# Optimizer and what `lr` 1.0 means to it: adamw and radam move every weight by about lr, whatever
# its gradient.
OPTIMIZERS = {
    "original": (torch.optim.SGD, 1.0),
    "adamw": (torch.optim.AdamW, 0.1),
    "radam": (torch.optim.RAdam, 0.1),
}
OVERSAMPLING = 32  # extra directions of the randomized SVD
# Its power iterations. Objective under an exact SVD after learning with the randomized one, x
# nearest (768 x 768, int8 row, top_p 0.2): 4 passes 0.51, 8 0.43, 12 0.40. Eight take 0.1 s for
# 3072 x 3072 on an H200, an exact SVD 0.6.
PASSES = 8
PULL = 0.9  # a shift that costs more weight error than allowed shrinks by this in each step


@dataclass(frozen=True)
class SvdOptions(Options):
    """Rank k = min(r, max_k, max(min_k, floor(top_p * r))), r = min(N, K); with k = r nothing is
    left to choose.

    `lr` is in units of the error: 1.0 moves `original` by the whole projected error, adamw and
    radam by a tenth of the root mean square error. `lr_threshold` is the relative improvement that
    counts as one. Learning ends after `num_iter` steps, `early_stop_stall` steps without
    improvement, below the rate `early_stop_lr`, or when the objective is `early_stop_loss` x that
    of the start. `weight_error` limits ||E||, x that of the start.
    """

    optimizer: str = "original"
    num_iter: int = 1000
    lr: float = 0.25
    lr_schedule: str = "adaptive"
    lr_gamma: float = 0.97
    lr_patience: int = 2
    lr_factor: float = 0.9
    lr_min: float = 1e-8
    lr_cooldown: int = 0
    lr_threshold: float = 0.0
    lr_adaptive_mode: str = "simple-reset"
    early_stop_loss: float = 0.0
    early_stop_lr: float = 1e-4
    early_stop_stall: int = 30
    top_p: float = 0.2
    min_k: int = 16
    max_k: int = 1024
    full_matrix: bool = False
    weight_error: float = 1.01

    choices: ClassVar = {
        "optimizer": tuple(OPTIMIZERS),
        "lr_schedule": SCHEDULES,
        "lr_adaptive_mode": ("simple-reset", "no-reset"),
    }
    ranges: ClassVar = {
        "num_iter": (0, 1_000_000),
        "lr": (1e-12, 100.0),
        "lr_gamma": (0.0, 1.0),
        "lr_patience": (0, 1_000_000),
        "lr_factor": (0.0, 1.0),
        "lr_min": (0.0, 100.0),
        "lr_cooldown": (0, 1_000_000),
        "lr_threshold": (0.0, 1.0),
        "early_stop_loss": (0.0, 1.0),
        "early_stop_lr": (0.0, 100.0),
        "early_stop_stall": (1, 1_000_000),
        "top_p": (0.0, 1.0),
        "min_k": (1, 1_000_000),
        "max_k": (1, 1_000_000),
        "weight_error": (1.0, 10.0),
    }

    def rank(self, shape: tuple[int, int]) -> int:
        r = min(shape)
        return min(r, self.max_k, max(self.min_k, int(self.top_p * r)))


@dataclass(frozen=True)
class Directions:
    """Orthonormal bases of the leading singular directions: left (N, k), right (K, k), float32."""

    left: torch.Tensor
    right: torch.Tensor

    def core(self, error: torch.Tensor) -> torch.Tensor:
        """U^T E V, (k, k)."""
        return self.left.T @ error @ self.right

    def spread(self, core: torch.Tensor) -> torch.Tensor:
        """U C V^T, (N, K): with C = U^T E V the gradient of ||U^T E V||^2 / 2 in E."""
        return (self.left @ core) @ self.right.T


class Svd(Method):
    name = "svd"
    Options = SvdOptions
    proxy = True

    def quantize(self, layer: Layer) -> tuple[torch.Tensor, Scale, Objective]:
        layer = replace(layer, weight=layer.weight.float())
        weight, grid, options = layer.weight, layer.grid, layer.options
        scale = clipped_scale(layer)
        rank = options.rank(tuple(weight.shape))
        directions = leading_directions(weight, rank, options.full_matrix, layer.generator)

        def objective(codes: torch.Tensor, scale: Scale) -> float:
            return float(directions.core(grid.decode(codes, scale) - weight).norm())

        return learn_codes(layer, scale, directions), scale, objective


def clipped_scale(layer: Layer) -> Scale:
    """The scale of `mse_clip` where it gains enough and no channel pays for it, else nearest's."""
    weight, grid = layer.weight, layer.grid
    searching = replace(layer, options=MseClipOptions())
    (plain, _), searched = searching.nearest_errors, search_scale(searching)
    before = grid.decode(grid.encode(weight, plain), plain).sub_(weight)
    after = grid.decode(grid.encode(weight, searched), searched).sub_(weight)
    gains = after.norm() <= WORTH_A_SCALE * before.norm()
    if gains and worst_channel(after, before) <= WORST_CHANNEL:
        return searched
    return plain


def worst_channel(error: torch.Tensor, before: torch.Tensor) -> float:
    """By how much the root mean square error of a row or column rises at most; small ones count as
    the mean.
    """
    ratios = []
    for dim in (0, 1):
        now, was = error.square().mean(dim).sqrt(), before.square().mean(dim).sqrt()
        ratios.append((now / was.clamp(min=was.mean())).amax())
    return float(torch.stack(ratios).amax())


def learn_codes(layer: Layer, scale: Scale, directions: Directions) -> torch.Tensor:
    """The codes with the smallest objective of all met whose weight error is at most `weight_error`
    x the start's.
    """
    weight, grid, options = layer.weight, layer.grid, layer.options
    codes = best_codes = grid.encode(weight, scale)
    error = grid.decode(codes, scale) - weight
    core = directions.core(error)
    start, plain = _norms(core, error)
    best, limit, stalled = start, options.weight_error * plain, 0
    unit = plain / weight.numel() ** 0.5  # root mean square error of one weight
    zero = weight.abs() < TINY  # zeros and padding keep their code
    shift = torch.zeros_like(weight)
    kind, unit_rate = OPTIMIZERS[options.optimizer]
    optimizer = kind([shift], lr=unit_rate * options.lr)
    rate = LearningRate(options)
    for _ in range(options.num_iter):
        if best <= options.early_stop_loss * start or stalled >= options.early_stop_stall:
            break
        layer.step()
        shift.grad = directions.spread(core).div_(unit).masked_fill_(zero, 0.0)
        optimizer.step()
        codes = grid.encode(torch.add(weight, shift, alpha=unit), scale)
        error = grid.decode(codes, scale).sub_(weight)
        core = directions.core(error)
        objective, plain = _norms(core, error)
        improved = plain <= limit and objective < best * (1.0 - options.lr_threshold)
        stalled = 0 if improved else stalled + 1
        if plain <= limit and objective < best:
            best, best_codes = objective, codes
        if plain > limit:
            shift.mul_(PULL)
        optimizer.param_groups[0]["lr"] = unit_rate * rate.update(improved)
        if rate.value < options.early_stop_lr:
            break
    return best_codes


def _norms(core: torch.Tensor, error: torch.Tensor) -> list[float]:
    return torch.stack([core.norm(), error.norm()]).tolist()  # one wait for the device


def leading_directions(
    weight: torch.Tensor, k: int, exact: bool, generator: torch.Generator | None
) -> Directions:
    """The k leading singular directions of a float32 matrix, in no particular order.

    Args:
        exact: use a full SVD; otherwise seeded randomized power iteration, unless the matrix is too
            small for it.

    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4, arXiv:0909.4061.
    """
    # squares of very large or small weights leave float32
    weight = weight / weight.abs().amax().clamp(min=TINY)
    n, columns = weight.shape
    width = k + OVERSAMPLING
    if exact or width >= min(n, columns):
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        return Directions(left[:, :k].contiguous(), right[:k].T.contiguous())
    right = torch.randn((columns, width), generator=generator, device=weight.device)
    for _ in range(PASSES):
        left = torch.linalg.qr(weight @ right).Q
        right = torch.linalg.qr(weight.T @ left).Q
    image = weight @ right
    right = right @ torch.linalg.eigh(image.T @ image).eigenvectors[:, -k:]  # eigenvalues ascend
    return Directions(torch.linalg.qr(weight @ right).Q, right)


register_method(Svd())
