"""Every kind of text encoder that ComfyUI tells apart, built by its own loader: in its real size without memory.

No part of FewBits is used here.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from functools import cache
from unittest import mock

import torch

# Kind of comfy.sd.TEModel -> the types of ComfyUI's loader that build it in their own way.
KINDS = {
    "CLIP_L": ("STABLE_DIFFUSION", "SD3", "HIDREAM"),
    "CLIP_G": ("STABLE_DIFFUSION", "STABLE_CASCADE", "SD3", "HIDREAM"),
    "CLIP_H": ("STABLE_DIFFUSION",),
    "T5_XXL": ("SD3", "LTXV", "PIXART", "CHROMA", "WAN", "HIDREAM", "COGVIDEOX", "MOCHI"),
    "T5_XXL_OLD": ("COSMOS",),
    "T5_XL": ("STABLE_DIFFUSION",),
    "T5_BASE": ("STABLE_AUDIO", "ACE"),
    "T5_GEMMA": ("STABLE_AUDIO",),
    "GEMMA_2_2B": ("LUMINA2", "PIXELDIT"),
    "GEMMA_3_4B": ("LUMINA2",),
    "GEMMA_3_4B_VISION": ("LUMINA2",),
    "GEMMA_3_12B": ("LTXV",),
    "GEMMA_4_E4B": ("STABLE_DIFFUSION",),
    "GEMMA_4_E2B": ("STABLE_DIFFUSION",),
    "GEMMA_4_31B": ("STABLE_DIFFUSION",),
    "GEMMA_4_12B": ("STABLE_DIFFUSION",),
    "LLAMA3_8": ("HIDREAM",),
    "QWEN25_3B": ("OMNIGEN2",),
    "QWEN25_7B": ("QWEN_IMAGE", "HUNYUAN_IMAGE", "LONGCAT_IMAGE"),
    "MISTRAL3_24B": ("FLUX2",),
    "MISTRAL3_24B_PRUNED_FLUX2": ("FLUX2",),
    "MINISTRAL_3_3B": ("STABLE_DIFFUSION",),
    "GPT_OSS_20B": ("LENS",),
    "QWEN3_06B": ("STABLE_DIFFUSION",),
    "QWEN3_2B": ("OVIS",),
    "QWEN3_4B": ("LUMINA2", "FLUX2"),
    "QWEN3_8B": ("FLUX2", "IDEOGRAM4"),
    "QWEN3VL_4B": ("STABLE_DIFFUSION", "FLUX2", "KREA2", "MAGE"),
    "QWEN3VL_8B": ("STABLE_DIFFUSION", "FLUX2", "IDEOGRAM4", "BOOGU", "JOYIMAGE"),
    "QWEN3VL_32B": ("MINIMAX",),
    "QWEN35_08B": ("STABLE_DIFFUSION",),
    "QWEN35_2B": ("STABLE_DIFFUSION",),
    "QWEN35_4B": ("STABLE_DIFFUSION",),
    "QWEN35_9B": ("STABLE_DIFFUSION",),
    "QWEN35_27B": ("STABLE_DIFFUSION",),
    "JINA_CLIP_2": ("STABLE_DIFFUSION",),
}
# Kinds that no type takes alone -> the type and the file before it.
IN_PAIRS = {"BYT5_SMALL_GLYPH": ("HUNYUAN_IMAGE", "QWEN25_7B")}
# Published under the names of transformers, which ComfyUI changes while loading.
PUBLISHED = {"model.": "model.language_model.", "visual.": "model.visual."}
OWN_NAMES = ("QWEN3VL_32B",)


class NoTokenizer:
    """In place of a tokenizer, most of which need a file of their own."""

    def __init__(self, **kwargs: object):
        pass

    def state_dict(self) -> dict:
        return {}


@contextlib.contextmanager
def without_memory(*kinds: str) -> Iterator[None]:
    """ComfyUI's loader builds its encoders on the meta device; it takes the files for these kinds."""
    import comfy.sd

    told = [comfy.sd.TEModel[kind] for kind in kinds]
    clip_init, meta = comfy.sd.CLIP.__init__, torch.device("meta")

    def no_tokenizer(self, target=None, *args, **kwargs):
        if target is not None:
            target = types.SimpleNamespace(**{**vars(target), "tokenizer": NoTokenizer})
        clip_init(self, target, *args, **kwargs)

    def find(state: dict) -> object:
        return told[0] if len(told) == 1 else told.pop(0)

    with contextlib.ExitStack() as stack:
        stack.enter_context(meta)
        for owner, name, instead in (
            (comfy.sd.CLIP, "__init__", no_tokenizer),
            (comfy.sd.CLIP, "load_sd", lambda *args, **kwargs: ([], [])),
            (comfy.sd, "detect_te_model", find),
            (comfy.model_management, "text_encoder_initial_device", lambda *args: meta),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def parts_of(clip: object) -> list[torch.nn.Module]:
    """The text encoders inside a CLIP, each with its `transformer`."""
    parts = clip.cond_stage_model.modules()
    return [
        part for part in parts if isinstance(getattr(part, "transformer", None), torch.nn.Module)
    ]


@cache
def encoder(kind: str, type: str = "") -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """A kind as a file for a type of the loader: shapes by name, and the names of its Linear layers."""
    import comfy.sd

    usual, first = IN_PAIRS.get(kind, (KINDS.get(kind, ("",))[0], None))
    files = [kind] if first is None else [first, kind]
    with without_memory(*files):
        clip = comfy.sd.load_text_encoder_state_dicts(
            [{} for _ in files], clip_type=comfy.sd.CLIPType[type or usual]
        )
    module = parts_of(clip)[-1].transformer
    linears = [
        name
        for name, part in module.named_modules()
        if hasattr(part, "in_features") and not hasattr(part, "num_experts")
    ]
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    shapes |= {f"{name}.weight": shape for name, shape in made_while_loading(module)}
    named = {published(kind, key, type): shape for key, shape in shapes.items()}
    return named, frozenset(published(kind, name, type) for name in linears)


def made_while_loading(module: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Layers that read codes have no weight before a file says which: their names and shapes."""
    for name, part in module.named_modules():
        if hasattr(part, "num_experts") and hasattr(part, "_orig_shape"):
            yield name, tuple(part._orig_shape)
        elif hasattr(part, "in_features"):
            yield name, (part.out_features, part.in_features)


def published(kind: str, name: str, type: str) -> str:
    if not kind.startswith(("QWEN3VL", "QWEN35")) or kind in OWN_NAMES:
        return name
    # For Flux.2 ComfyUI leaves the names as they are, and would find no layer under theirs.
    changed = {"visual.": "model.visual."} if type == "FLUX2" else PUBLISHED
    for ours, theirs in changed.items():
        if name.startswith(ours) and not name.startswith("model.lm_head"):
            return theirs + name[len(ours) :]
    return name
