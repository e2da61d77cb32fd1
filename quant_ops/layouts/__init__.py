"""Runtime tensors of the formats that comfy_kitchen has no layout for; comfy_kitchen is imported
only in here.
"""

from .handlers import linear
from .native import linear as linear_native
from .native import multiplies_layout, multiplies_native, product_of, traced
from .pack import layout_name, register_layout
from .product import HALVES, Product, Traced, multiply_traced, runs_alone

__all__ = [
    "HALVES",
    "Product",
    "Traced",
    "layout_name",
    "linear",
    "linear_native",
    "multiplies_layout",
    "multiplies_native",
    "multiply_traced",
    "product_of",
    "register_layout",
    "runs_alone",
    "traced",
]
