"""svd: learned rounding that clears the error out of the weight's leading singular directions. Needs no data.

U, V span the k leading singular directions of W, E = Q - W is the error of the codes that will be stored, and the
objective is ||U^T E V||. A continuous shift of the weights is what the optimizer moves; its codes are the nearest ones
to the shifted weight under the `mse_clip` scale, and the gradient is taken at these codes: U (U^T E V) V^T. So a
weight close to the middle between two codes flips first, and what is measured is what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.grids import Grid, Scale
from ...kernels.scales import TINY
from .base import Layer, Method, MethodOptions, Objective, register_method
from .learning_rate import LearningRate
from .mse_clip import MseClipOptions, search_scale

# Optimizer and what `lr` 1.0 means to it: adamw and radam move every weight by about lr, whatever its gradient.
OPTIMIZERS = {"original": (torch.optim.SGD, 1.0), "adamw": (torch.optim.AdamW, 0.1), "radam": (torch.optim.RAdam, 0.1)}
OVERSAMPLING = 32  # extra directions of the randomized SVD
PASSES = 4  # of its power iteration
PULL = 0.9  # a shift that costs too much weight error shrinks by this in each step


@dataclass(frozen=True)
class SvdOptions(MethodOptions):
    """Rank k = min(r, max_k, max(min_k, floor(top_p * r))), r = min(N, K).

    `lr` is in units of the error: 1.0 moves `original` by the whole projected error, adamw and radam by one root mean
    square error per weight. `early_stop_loss` is a fraction of the objective of the start, `early_stop_stall` steps
    without improvement. `weight_error` limits ||E||, x that of the start.
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
        "lr_schedule": ("adaptive", "exponential", "plateau"),
        "lr_adaptive_mode": ("simple-reset", "no-reset"),
    }
    ranges: ClassVar = {
        "num_iter": (0, 1_000_000), "lr": (1e-12, 100.0), "lr_gamma": (0.0, 1.0), "lr_patience": (0, 1_000_000),
        "lr_factor": (0.0, 1.0), "lr_min": (0.0, 100.0), "lr_cooldown": (0, 1_000_000), "lr_threshold": (0.0, 1.0),
        "early_stop_loss": (0.0, 1.0), "early_stop_lr": (0.0, 100.0), "early_stop_stall": (1, 1_000_000),
        "top_p": (0.0, 1.0), "min_k": (1, 1_000_000), "max_k": (1, 1_000_000), "weight_error": (1.0, 10.0),
    }  # fmt: skip

    def rank(self, shape: tuple[int, int]) -> int:
        r = min(shape)
        return min(r, self.max_k, max(self.min_k, int(self.top_p * r)))


@dataclass(frozen=True)
class Projection:
    """Orthonormal bases of the leading singular directions: left (N, k), right (K, k), float32."""

    left: torch.Tensor
    right: torch.Tensor

    def core(self, error: torch.Tensor) -> torch.Tensor:
        """U^T E V, (k, k)."""
        return self.left.T @ error @ self.right

    def spread(self, core: torch.Tensor) -> torch.Tensor:
        """U C V^T, (N, K): the gradient of ||U^T E V||^2 / 2 in E."""
        return (self.left @ core) @ self.right.T


class Svd(Method):
    name = "svd"
    Options = SvdOptions
    proxy = True

    def quantize(self, layer: Layer) -> tuple[torch.Tensor, Scale, Objective]:
        weight, grid, options = layer.weight.float(), layer.grid, layer.options
        scale = search_scale(Layer(weight, grid, MseClipOptions(), layer.generator, layer.step))
        bases = leading_directions(weight, options.rank(tuple(weight.shape)), options.full_matrix, layer.generator)
        codes = learn_codes(weight, grid, scale, bases, options, layer.step)
        return codes, scale, lambda codes, scale: float(bases.core(grid.decode(codes, scale) - weight).norm())


def learn_codes(weight, grid: Grid, scale: Scale, bases: Projection, options: SvdOptions, step) -> torch.Tensor:
    """The codes with the smallest objective among those met, at most `weight_error` x the error of the start."""
    fixed = weight.abs() < TINY  # zeros and padding keep their code
    shift = torch.zeros_like(weight)
    best_codes = codes = grid.encode(weight, scale)
    error = grid.decode(codes, scale) - weight
    core = bases.core(error)
    start, plain = _norms(core, error)
    unit = plain / weight.numel() ** 0.5  # root mean square error of one weight
    if start == 0.0:
        return codes
    best, limit, stalled = start, options.weight_error * plain, 0
    kind, unit_rate = OPTIMIZERS[options.optimizer]
    optimizer = kind([shift], lr=unit_rate * options.lr)
    rate = LearningRate(options)
    for _ in range(options.num_iter):
        step()
        shift.grad = bases.spread(core).div_(unit).masked_fill_(fixed, 0.0)
        optimizer.step()
        codes = grid.encode(torch.add(weight, shift, alpha=unit), scale)
        error = torch.sub(grid.decode(codes, scale), weight)
        core = bases.core(error)
        objective, plain = _norms(core, error)
        improved = plain <= limit and objective < best * (1.0 - options.lr_threshold)
        if plain <= limit and objective < best:
            best, best_codes = objective, codes
        stalled = 0 if improved else stalled + 1
        if best <= options.early_stop_loss * start or stalled >= options.early_stop_stall:
            break
        if plain > limit:
            shift.mul_(PULL)
        optimizer.param_groups[0]["lr"] = unit_rate * rate.update(improved)
        if rate.value < options.early_stop_lr:
            break
    return best_codes


def _norms(core: torch.Tensor, error: torch.Tensor) -> list[float]:
    return torch.stack([core.norm(), error.norm()]).tolist()  # one wait for the device


def leading_directions(weight: torch.Tensor, k: int, exact: bool, generator: torch.Generator) -> Projection:
    """The k leading singular directions, by full SVD when `exact`, else by seeded randomized power iteration.

    Source: Halko, Martinsson, Tropp 2011, algorithm 4.4, arXiv:0909.4061.
    """
    n, columns = weight.shape
    width = min(k + OVERSAMPLING, n, columns)
    if exact or width == min(n, columns):
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        return Projection(left[:, :k].contiguous(), right[:k].T.contiguous())
    right = torch.randn((columns, width), generator=generator, device=weight.device)
    for _ in range(PASSES):
        left = torch.linalg.qr(weight @ right).Q
        right = torch.linalg.qr(weight.T @ left).Q
    image = weight @ right
    directions = torch.linalg.eigh(image.T @ image).eigenvectors  # ascending
    right = right @ directions[:, -k:]
    return Projection(torch.linalg.qr(weight @ right).Q, right)


register_method(Svd())
