"""Seam: merging with a quantized model. ComfyUI looks for every stored tensor as a weight and finds
scales.
"""

from __future__ import annotations

import functools

from comfy.model_patcher import ModelPatcher
from comfy_kitchen.tensor import QuantizedTensor

MARK = "_fewbits_wrapped"


def install() -> None:
    """Wrap `ModelPatcher.get_key_patches`, which ModelMerge nodes, CLIPMerge nodes and weight hooks
    call.

    For any quantized model, of ComfyUI's formats too, it ends in an AttributeError at the first
    scale. The weights themselves need nothing: they are handed over with their layer's
    `convert_weight`, which decodes them.
    """
    original = ModelPatcher.get_key_patches
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def get_key_patches(self, *args: object, **kwargs: object) -> dict:
        quantized = {
            name
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "weight", None), QuantizedTensor)
        }
        if not quantized:
            return original(self, *args, **kwargs)
        listed = self.model_state_dict()
        weights = {key: value for key, value in listed.items() if not _is_side(key, quantized)}
        self.model_state_dict = lambda *args, **kwargs: weights  # hides the method for this call
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.model_state_dict

    setattr(get_key_patches, MARK, True)
    ModelPatcher.get_key_patches = get_key_patches


def _is_side(key: str, quantized: set[str]) -> bool:
    """A scale or the marker of a quantized layer."""
    base, _, name = key.rpartition(".")
    return base in quantized and name not in ("weight", "bias")
