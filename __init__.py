"""FewBits: make diffusion models and text encoders small and fast in ComfyUI, and prove what was
given up.

Under ComfyUI this module registers FewBits' formats and nodes; anywhere else importing it has no
effect, and the library (`from fewbits import quantize_file`) is loaded on first use.
"""

import sys

WEB_DIRECTORY = "./web"
__all__ = [
    "FORMATS",
    "METHODS",
    "Recipe",
    "compare_files",
    "convert_file",
    "inspect_file",
    "make_plan",
    "quantize",
    "quantize_file",
    "repair_file",
    "verify_file",
]

if "comfy.ops" in sys.modules:  # ComfyUI loads it before any pack; outside ComfyUI nobody does
    from .nodes import bridge

    bridge.register()


async def comfy_entrypoint():
    """ComfyUI's V3 entry point: the pack's extension object."""
    from .nodes.extension import FewBitsExtension

    return FewBitsExtension()


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import quant_ops

    return getattr(quant_ops, name)
