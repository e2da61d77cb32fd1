"""Seam: ControlNet files with quantized layers are refused; ComfyUI would read codes as weights,
without an error.
"""

from __future__ import annotations

import functools

import comfy.controlnet

from ...quant_ops.checkpoint.importers.source import is_side, split_name
from ...quant_ops.errors import UnsupportedLayerError

MARK = "_fewbits_wrapped"


def install() -> None:
    """Wrap `comfy.controlnet.load_controlnet_state_dict`, through which every ControlNet loader
    goes.
    """
    original = comfy.controlnet.load_controlnet_state_dict
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def load_controlnet_state_dict(state_dict: dict, *args: object, **kwargs: object):
        found = next((name for name in state_dict if is_side(name)), None)
        if found is not None:
            raise UnsupportedLayerError(
                f"layer '{split_name(found)[0]}' of this ControlNet is quantized ('{found}'): "
                "ComfyUI has no quantized layers for ControlNet and would read its codes as "
                "weights; load the original file"
            )
        return original(state_dict, *args, **kwargs)

    setattr(load_controlnet_state_dict, MARK, True)
    comfy.controlnet.load_controlnet_state_dict = load_controlnet_state_dict
