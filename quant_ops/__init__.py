"""The product without a user interface: plan, quantize, convert, repair, verify, compare and
inspect models.
"""

import importlib

# name -> its module, imported on first use: `fewbits --help` shall not wait for torch
_HOMES = {
    "FORMATS": ".formats",
    "METHODS": ".methods",
    "Recipe": ".planning.recipe",
    "compare_files": ".doors",
    "convert_file": ".doors",
    "inspect_file": ".doors",
    "make_plan": ".planning.planner",
    "quantize": ".pipeline",
    "quantize_file": ".doors",
    "repair_file": ".doors",
    "verify_file": ".doors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
