"""Seam `merging`: a quantized model can be merged, as its decoded weights.

Wraps: `ModelPatcher.get_key_patches`, which ModelMerge nodes, CLIPMerge nodes and weight hooks
    call.
Why: ComfyUI looks for every stored tensor as a weight of a module and finds scales. The weights
    themselves need nothing: they are handed over with their layer's `convert_weight`, which
    decodes them.
Since: every ComfyUI that FewBits supports (0.18).
Without it: merging ends in `AttributeError: 'Linear' object has no attribute 'weight_scale'` for
    every quantized model, of ComfyUI's own formats too.
"""

from __future__ import annotations

from collections.abc import Callable

from comfy.model_patcher import ModelPatcher

from ..weights import is_side, quantized_layers
from .wrap import wrap


def install() -> None:
    wrap(ModelPatcher, "get_key_patches", _weights_only)


def _weights_only(
    original: Callable, patcher: ModelPatcher, *args: object, **kwargs: object
) -> dict:
    quantized = quantized_layers(patcher.model)
    if not quantized:
        return original(patcher, *args, **kwargs)
    listed = patcher.model_state_dict()
    weights = {key: value for key, value in listed.items() if not is_side(key, quantized)}
    patcher.model_state_dict = lambda *args, **kwargs: weights  # hides the method for this call
    try:
        return original(patcher, *args, **kwargs)
    finally:
        del patcher.model_state_dict
