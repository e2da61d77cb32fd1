"""Seam `text_encoders`: every quantized text encoder is built of quantized layers.

Wraps: `comfy.sd.CLIP.__init__`, through which every loader of text encoders goes.
Why: ComfyUI looks for markers in T5-XXL and the language models only; CLIP-L and others are built
    of plain layers whatever their files say. The text encoder also remembers here how it was
    built, so that a quantized one can be built like it; and one that does not fit what ComfyUI
    builds is refused in one sentence with both widths.
Since: ComfyUI 0.8.
Without it: codes of CLIP-L, CLIP-G, T5-base and others are taken for weights, without an error;
    and Quantize Text Encoder refuses every CLIP.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import comfy.sd

from ....quant_ops.errors import CheckpointError, QuantError
from .wrap import wrap

MADE = "_fewbits_made"
SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([\d, ]*)\]\) from "
    r"checkpoint, the shape in current model is torch\.Size\(\[([\d, ]*)\]\)"
)


@dataclass(frozen=True)
class Made:
    """How ComfyUI built a text encoder, its weights apart: what it takes to build one like it."""

    target: object  # classes of the encoder and of its tokenizer
    model_options: dict


def install() -> None:
    wrap(comfy.sd.CLIP, "__init__", _mark_and_remember)


def _mark_and_remember(
    original: Callable,
    clip: comfy.sd.CLIP,
    target: object = None,
    *args: object,
    **kwargs: object,
) -> None:
    given = kwargs.get("model_options") or {}
    states = kwargs.get("state_dict", [])
    states = states if isinstance(states, list) else [states]
    decided = "quantization_metadata" in given or "custom_operations" in given
    quantized = any(key.endswith(".comfy_quant") for key in chain(*states))
    if quantized and not decided:
        kwargs["model_options"] = {**given, "quantization_metadata": {"mixed_ops": True}}
    with misfits_named("a quantized text encoder") if quantized else contextlib.nullcontext():
        original(clip, target, *args, **kwargs)
    if target is not None:  # without one, ComfyUI fills in a clone
        setattr(clip.cond_stage_model, MADE, Made(target, given))


@contextlib.contextmanager
def misfits_named(what: str) -> Iterator[None]:
    """Say torch's wall of size mismatches in one sentence.

    Raises:
        CheckpointError: weights have other shapes than the text encoder that ComfyUI built.
    """
    try:
        yield
    except RuntimeError as error:
        misfits = SIZE_MISMATCH.findall(str(error))
        if not misfits:
            raise
        layer, stored, wanted = misfits[0]
        raise CheckpointError(
            f"{what}: {len(misfits)} weights do not fit the text encoder that ComfyUI builds for "
            f"this type ('{layer}' is [{stored}] in the file, [{wanted}] in the encoder); choose "
            "the type that this file belongs to, or the file for this type"
        ) from None


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
