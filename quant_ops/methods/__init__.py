"""How codes and scales are chosen. A method sees a grid, never a format name."""

from .adaround import Adaround
from .base import METHODS, Choice, Layer, choose, get_method, layer_generator
from .gptq import Gptq
from .inputs import Inputs
from .mse_clip import MseClip
from .nearest import Nearest
from .svd import Svd

__all__ = [
    "METHODS",
    "Adaround",
    "Choice",
    "Gptq",
    "Inputs",
    "Layer",
    "MseClip",
    "Nearest",
    "Svd",
    "choose",
    "get_method",
    "layer_generator",
]
