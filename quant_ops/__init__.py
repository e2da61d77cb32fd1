"""The product without a user interface: plan, quantize, convert, repair, verify and inspect
models.
"""

from .doors import convert_file, inspect_file, quantize_file, repair_file, verify_file
from .formats import FORMATS
from .methods import METHODS
from .pipeline import quantize
from .planning.planner import make_plan
from .planning.recipe import Recipe

__all__ = [
    "FORMATS",
    "METHODS",
    "Recipe",
    "convert_file",
    "inspect_file",
    "make_plan",
    "quantize",
    "quantize_file",
    "repair_file",
    "verify_file",
]
