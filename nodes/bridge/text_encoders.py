"""Seam 12: text encoders that ComfyUI never marks as quantized are marked, and remember how they
were built.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import comfy.sd

from ...quant_ops.errors import QuantError

MARK = "_fewbits_wrapped"
MADE = "_fewbits_made"


@dataclass(frozen=True)
class Made:
    """How ComfyUI built a text encoder, its weights apart: what it takes to build one like it."""

    target: object  # classes of the encoder and of its tokenizer
    model_options: dict


def install() -> None:
    """Wrap `comfy.sd.CLIP.__init__`, through which every loader goes.

    CLIP-L and others are loaded as plain layers whatever their files say, so that codes would
    become weights.
    """
    original = comfy.sd.CLIP.__init__
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def __init__(self, target: object = None, *args: object, **kwargs: object) -> None:
        given = kwargs.get("model_options") or {}
        states = kwargs.get("state_dict", [])
        states = states if isinstance(states, list) else [states]
        decided = "quantization_metadata" in given or "custom_operations" in given
        if not decided and any(key.endswith(".comfy_quant") for state in states for key in state):
            kwargs["model_options"] = {**given, "quantization_metadata": {"mixed_ops": True}}
        original(self, target, *args, **kwargs)
        if target is not None:  # without one, ComfyUI fills in a clone
            setattr(self.cond_stage_model, MADE, Made(target, given))

    setattr(__init__, MARK, True)
    comfy.sd.CLIP.__init__ = __init__


def made_by(clip: comfy.sd.CLIP) -> Made:
    """How this text encoder was built.

    Raises:
        QuantError: by other means than ComfyUI's own class.
    """
    made = getattr(clip.cond_stage_model, MADE, None)
    if made is None:
        raise QuantError(
            f"this CLIP ({type(clip.cond_stage_model).__name__}) was made by a node that builds "
            "text encoders in its own way, so it cannot be built again: convert its file with "
            "Quantize File and load that"
        )
    return made
