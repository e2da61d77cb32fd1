"""What a method is, and the registry of methods."""

from __future__ import annotations

from typing import Protocol

import torch

from ...kernels.grids import Grid, Scale
from ..errors import RecipeError


class Method(Protocol):
    """Chooses codes and scales for one layer."""

    name: str

    def quantize(self, weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Scale]:
        """weight (N, K) -> (codes, scale) as the grid defines them."""


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
