"""How codes and scales are chosen. A method sees a grid, never a format name."""

from .base import METHODS, get_method
from .nearest import Nearest

__all__ = ["METHODS", "Nearest", "get_method"]
