"""Runtime tensors of the formats that comfy_kitchen has no layout for; comfy_kitchen is imported
only in here.
"""

from .pack import layout_name, linear, register_layout

__all__ = ["layout_name", "linear", "register_layout"]
