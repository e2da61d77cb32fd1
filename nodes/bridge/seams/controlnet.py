"""Seam `controlnet`: ControlNet files with quantized layers are refused by name.

Wraps: `comfy.controlnet.load_controlnet_state_dict`, through which every ControlNet loader goes.
Why: ComfyUI builds ControlNets out of plain layers, whatever their file says.
Since: every ComfyUI that FewBits supports (0.18); 0.33 has no quantized ControlNet either.
Without it: codes are taken for weights, and the picture is noise without an error.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.controlnet

from ....quant_ops.checkpoint.importers.source import is_side, split_name
from ....quant_ops.errors import UnsupportedLayerError
from .wrap import wrap


def install() -> None:
    wrap(comfy.controlnet, "load_controlnet_state_dict", _refuse_quantized)


def _refuse_quantized(original: Callable, state_dict: dict, *args: object, **kwargs: object):
    found = next((name for name in state_dict if is_side(name)), None)
    if found is not None:
        raise UnsupportedLayerError(
            f"layer '{split_name(found)[0]}' of this ControlNet is quantized ('{found}'): "
            "ComfyUI has no quantized layers for ControlNet and would read its codes as "
            "weights; load the original file"
        )
    return original(state_dict, *args, **kwargs)
