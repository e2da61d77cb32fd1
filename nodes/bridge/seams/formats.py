"""Seam `formats`: ComfyUI knows the names of our formats and the tensor classes behind them.

Wraps: nothing. Adds entries to `comfy.quant_ops.QUANT_ALGOS` and layout classes to comfy-kitchen's
    registry.
Why: whatever of ComfyUI meets a quantized layer (LoRA, saving, offloading) looks its format up by
    name. An entry that ComfyUI has itself stays ComfyUI's: a format is ours only where ComfyUI
    does not know it, so INT8 files open before 0.27, which brought `int8_tensorwise`.
Since: ComfyUI 0.8, where quantized layers became comfy-kitchen's.
Without it: `KeyError: 'bnb_nf4'` while a file of ours is loaded.
"""

from __future__ import annotations

import comfy.quant_ops
from comfy_kitchen.tensor import get_layout_class

from ....quant_ops.formats import FORMATS, FormatOptions, get_format
from ....quant_ops.layouts import register_layout
from ....quant_ops.sources import TORCH_DTYPES

# Formats that ComfyUI did not know when we registered; the others stay ComfyUI's own.
OWNED: set[str] = set()


def install() -> None:
    """Names into QUANT_ALGOS and layout classes into the registry; existing entries are never
    changed.
    """
    algos = comfy.quant_ops.QUANT_ALGOS
    OWNED.update(name for name in FORMATS if name not in algos)
    for name in FORMATS:
        if name not in OWNED:
            continue
        format = get_format(name)
        algos[name] = {
            "storage_t": TORCH_DTYPES[format.code_dtype],
            "parameters": set(format.dtypes) - {"weight"},
            "comfy_tensor_layout": layout_of(name, format.Options()),
            "quantize_input": False,
        }


def layout_of(name: str, options: FormatOptions) -> str:
    """The registered name of a format's layout class with these options, made on first use."""
    layout = register_layout(name, options)
    registry = getattr(comfy.quant_ops, "LAYOUTS", None)
    if isinstance(registry, dict):  # ComfyUI <= 0.7 kept its own
        registry.setdefault(layout, get_layout_class(layout))
    return layout
