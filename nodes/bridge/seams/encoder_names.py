"""Seam `encoder_names`: quantized CLIP-G and CLIP-H under OpenCLIP's names are refused by name.

Wraps: `comfy.diffusers_convert.convert_text_enc_state_dict_v20`, which saving a checkpoint of
    Stable Diffusion 2 or XL calls, and `comfy.utils.clip_text_transformers_convert`, which loading
    one does.
Why: both rename weights and biases, and put q, k and v together or apart, but know no scales.
Since: every ComfyUI that FewBits supports (0.18); 0.33 knows no scales there either.
Without it: codes are saved without their scales, or taken for weights, and the picture is noise
    without an error.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.diffusers_convert
import comfy.utils

from ....quant_ops.checkpoint.importers.source import is_side, split_name
from ....quant_ops.errors import UnsupportedLayerError
from .wrap import wrap

RESBLOCKS = ".resblocks."


def install() -> None:
    wrap(comfy.diffusers_convert, "convert_text_enc_state_dict_v20", _refuse_saving)
    wrap(comfy.utils, "clip_text_transformers_convert", _refuse_loading)


def _refuse_saving(original: Callable, state_dict: dict, prefix: str = "", **kwargs: object):
    found = next((name for name in state_dict if name.startswith(prefix) and is_side(name)), None)
    if found is not None:
        raise UnsupportedLayerError(
            f"layer '{split_name(found)[0]}' of the text encoder is quantized: checkpoints of this "
            "model store it under OpenCLIP's names, for which ComfyUI knows no scales; save the "
            "checkpoint with the encoder that is not quantized, and the quantized one with CLIPSave"
        )
    return original(state_dict, prefix, **kwargs)


def _refuse_loading(original: Callable, state_dict: dict, *args: object, **kwargs: object):
    found = next((name for name in state_dict if RESBLOCKS in name and is_side(name)), None)
    if found is not None:
        raise UnsupportedLayerError(
            f"layer '{split_name(found)[0]}' of the text encoder is quantized under OpenCLIP's "
            "names, for which ComfyUI knows no scales; load the original file"
        )
    return original(state_dict, *args, **kwargs)
