"""The product without a user interface: plan, quantize and inspect models."""

from .formats import FORMATS
from .inspection import inspect_file
from .methods import METHODS
from .pipeline import quantize, quantize_file
from .planning.planner import make_plan
from .planning.recipe import Recipe

__all__ = ["FORMATS", "METHODS", "Recipe", "inspect_file", "make_plan", "quantize", "quantize_file"]
