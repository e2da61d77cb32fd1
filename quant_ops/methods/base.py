"""What a method is, which options it has, and the guard: a method's codes are used only if nearest
is not better.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from ...kernels.grids import Deviation, Grid, Scale
from ..errors import RecipeError
from ..options import Configurable
from .inputs import Inputs

# Plain weight error allowed to a method whose objective is only a proxy, x nearest:
# docs/rules.md#methods.
WEIGHT_ERROR_LIMIT = 1.02

NOTHING = Deviation(0.0, 0.0, 0.0, 0.0)  # of a weight without elements

# (codes, scale) -> what a method minimises, measured on these codes.
Objective = Callable[[torch.Tensor, Scale], float]


class WeightError:
    """In place of an objective: the method minimises ||Q - W||, which is measured of all codes
    anyway.
    """


@dataclass(frozen=True)
class Layer:
    """What a method is given.

    `weight` (N, K) is the matrix that gets codes: rotated or padded where the format says so.
    `generator` lives on the weight's device and belongs to this layer alone. `step` is called
    within long work and may raise to cancel. `inputs` is there for methods that need it.
    """

    weight: torch.Tensor
    grid: Grid
    options: Any
    generator: torch.Generator
    step: Callable[[], None] = lambda: None
    inputs: Inputs | None = None

    @cached_property
    def nearest_errors(self) -> tuple[Scale, torch.Tensor]:
        """Scale of round-to-nearest, and the squared error of each of its regions; the codes are
        not kept.
        """
        codes, scale = self.grid.nearest(self.weight)
        return scale, self.grid.region_errors(self.weight, codes, scale)


class Method(Configurable, ABC):
    """Chooses codes and scales for one layer; sees a grid, never a format.

    `proxy`: the objective leaves out part of the weight's error, so that the guard limits that
    error as well. `in_passes`: a few passes over the weight in cache-sized chunks and hardly any
    memory beside it, so that layers side by side are faster than threads inside one.
    `needs_inputs`: works from a calibration.
    """

    noun = "method"
    proxy = False
    in_passes = False
    needs_inputs = False

    @property
    def options(self) -> dict[str, object]:
        """Names of the options and their defaults."""
        return asdict(self.Options())

    @abstractmethod
    def quantize(
        self, layer: Layer
    ) -> tuple[torch.Tensor, Scale, Objective | WeightError | Deviation]:
        """(codes, scale, objective), the first two as the grid defines them; a Deviation, that of
        these codes: nothing to compare.
        """


@dataclass(frozen=True)
class Choice:
    """Codes and scale of one layer, and how they compare; errors are sums of squares over the whole
    weight.

    `deviation` and `objective` belong to these codes, `*_nearest` to nearest's; None where nothing
    was compared. `verdict` says why nearest was taken in place of the method, empty when it was
    not.
    """

    codes: torch.Tensor
    scale: Scale
    deviation: Deviation
    error_nearest: float | None = None
    objective: float | None = None
    objective_nearest: float | None = None
    verdict: str = ""


def choose(method: Method, layer: Layer) -> Choice:
    """The method's codes, or nearest's unless the method is at least as good: on its own objective,
    measured on the codes, and for a proxy objective also within WEIGHT_ERROR_LIMIT of nearest's
    plain error.
    """
    weight, grid = layer.weight, layer.grid
    if not weight.numel():
        return Choice(*grid.nearest(weight), NOTHING)
    codes, scale, objective = method.quantize(layer)
    if isinstance(objective, Deviation):
        return Choice(codes, scale, objective)
    deviation = grid.deviation(weight, codes, scale)
    error = deviation.error
    # both as sums over regions: equal codes give equal numbers
    if isinstance(objective, WeightError):
        regions = grid.region_errors(weight, codes, scale), layer.nearest_errors[1]
        error, plain_error = (float(part.sum(dtype=torch.float64)) for part in regions)
        deviation = deviation._replace(error=error)
        value, plain_value = math.sqrt(error), math.sqrt(plain_error)
        plain = None
    else:
        plain = grid.nearest(weight)
        plain_error = grid.deviation(weight, *plain).error
        value, plain_value = objective(codes, scale), objective(*plain)
    verdict = ""
    if not value <= plain_value:  # also when a value is NaN
        verdict = f"nearest was better: objective {plain_value:.4g}, {method.name} {value:.4g}"
    elif method.proxy and not error <= WEIGHT_ERROR_LIMIT**2 * plain_error:
        ratio = (error / plain_error) ** 0.5 if plain_error else float("inf")
        verdict = (
            f"nearest was better: {method.name} had {ratio:.3f} x its weight error, "
            f"{WEIGHT_ERROR_LIMIT:g} allowed"
        )
    if verdict:
        plain = plain or grid.nearest(weight)
        deviation = grid.deviation(weight, *plain)._replace(error=plain_error)
        return Choice(
            *plain,
            deviation,
            error_nearest=plain_error,
            objective=plain_value,
            objective_nearest=plain_value,
            verdict=verdict,
        )
    return Choice(
        codes,
        scale,
        deviation,
        error_nearest=plain_error,
        objective=value,
        objective_nearest=plain_value,
    )


def layer_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """The layer's own random numbers, from the recipe's seed and its name: order and neighbours
    change nothing.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Look a method up by name.

    Raises:
        RecipeError: no method has this name; the message lists those that exist.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}; known methods: {', '.join(sorted(METHODS))}")
    return METHODS[name]
