"""Every kind of text encoder that ComfyUI tells apart, built by its own loader: in its real size without memory.

No part of FewBits is used here.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
# Types of the loader that take several files at once, in the order of the encoders that they make.
TOGETHER = [
    ("STABLE_DIFFUSION", ("CLIP_L", "CLIP_G")),
    ("SD3", ("CLIP_L", "CLIP_G", "T5_XXL")),
    ("FLUX", ("CLIP_L", "T5_XXL")),
    ("HUNYUAN_DIT", ("BERT", "T5_XL")),
    ("HUNYUAN_VIDEO", ("CLIP_L", "LLAMA3_8")),
    ("HIDREAM", ("CLIP_L", "CLIP_G", "T5_XXL", "LLAMA3_8")),
    ("HUNYUAN_IMAGE", ("QWEN25_7B", "BYT5_SMALL_GLYPH")),
    ("HUNYUAN_VIDEO_15", ("QWEN25_7B", "BYT5_SMALL_GLYPH")),
    ("KANDINSKY5", ("QWEN25_7B", "CLIP_L")),
    ("KANDINSKY5_IMAGE", ("QWEN25_7B", "CLIP_L")),
    ("NEWBIE", ("GEMMA_3_4B", "JINA_CLIP_2")),
    ("ACE", ("QWEN3_06B", "QWEN3_2B")),
    ("ACE", ("QWEN3_06B", "QWEN3_4B")),
]
# Published under the names of transformers, which ComfyUI changes while loading.
PUBLISHED = {"model.": "model.language_model.", "visual.": "model.visual."}
OWN_NAMES = ("QWEN3VL_32B",)


@dataclass(frozen=True)
class Route:
    """Files that ComfyUI's loader takes together for a type, one of which is what a test is about."""

    type: str
    files: tuple[str, ...]
    about: int = 0

    @property
    def kind(self) -> str:
        return self.files[self.about]

    @property
    def name(self) -> str:
        others = [kind for number, kind in enumerate(self.files) if number != self.about]
        return "-".join([self.kind, self.type, *others])


ROUTES = [Route(type, (kind,)) for kind, types in KINDS.items() for type in types]
ROUTES += [Route(type, kinds, about) for type, kinds in TOGETHER for about in range(len(kinds))]


class NoTokenizer:
    """In place of a tokenizer, most of which need a file of their own."""

    def __init__(self, **kwargs: object):
        pass

    def state_dict(self) -> dict:
        return {}


@contextlib.contextmanager
def no_tokenizer() -> Iterator[None]:
    """ComfyUI's loader makes text encoders that are given their tokens as numbers."""
    import comfy.sd

    clip_init = comfy.sd.CLIP.__init__

    def no_tokenizer(self, target=None, *args, **kwargs):
        if target is not None:
            target = types.SimpleNamespace(**{**vars(target), "tokenizer": NoTokenizer})
        clip_init(self, target, *args, **kwargs)

    with mock.patch.object(comfy.sd.CLIP, "__init__", no_tokenizer):
        yield


@contextlib.contextmanager
def told_kinds(kinds: tuple[str, ...]) -> Iterator[None]:
    """ComfyUI's loader takes the files for these kinds, in their order; for none, a file of no kind."""
    import comfy.sd

    told = itertools.cycle([comfy.sd.TEModel.__members__.get(kind) for kind in kinds])
    with mock.patch.object(comfy.sd, "detect_te_model", lambda state: next(told)):
        yield


@contextlib.contextmanager
def without_memory(*kinds: str) -> Iterator[None]:
    """ComfyUI's loader builds its encoders on the meta device; it takes the files for these kinds."""
    import comfy.sd

    meta = torch.device("meta")
    with contextlib.ExitStack() as stack:
        stack.enter_context(meta)
        stack.enter_context(no_tokenizer())
        stack.enter_context(told_kinds(kinds))
        for owner, name, instead in (
            (comfy.sd.CLIP, "load_sd", lambda *args, **kwargs: ([], [])),
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
    usual, first = IN_PAIRS.get(kind, (KINDS.get(kind, ("",))[0], None))
    files = (kind,) if first is None else (first, kind)
    return encoders(type or usual, files)[-1]


@cache
def encoders(type: str, files: tuple[str, ...]) -> list[tuple[dict, frozenset[str]]]:
    """The files that a type of the loader takes together, each as `encoder` gives it."""
    import comfy.sd

    with without_memory(*files):
        clip = comfy.sd.load_text_encoder_state_dicts(
            [{} for _ in files], clip_type=comfy.sd.CLIPType[type]
        )
    modules = [part.transformer for part in parts_of(clip)]
    assert len(modules) == len(files)
    return [
        described(module, lambda name, kind=kind: published(kind, name, type))
        for module, kind in zip(modules, files, strict=True)
    ]


def described(
    module: torch.nn.Module, named: Callable[[str], str]
) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    shapes |= dict(made_while_loading(module))
    linears = [
        name
        for name, part in module.named_modules()
        if hasattr(part, "in_features") and not hasattr(part, "num_experts")
    ]
    return {named(key): shape for key, shape in shapes.items()}, frozenset(map(named, linears))


def made_while_loading(module: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Layers that read codes have no weight before a file says which: names and shapes of their tensors."""
    for name, part in module.named_modules():
        if hasattr(part, "num_experts") and hasattr(part, "_orig_shape"):
            yield f"{name}.weight", tuple(part._orig_shape)
        elif hasattr(part, "in_features"):
            yield f"{name}.weight", (part.out_features, part.in_features)
            if part.bias is not None:
                yield f"{name}.bias", (part.out_features,)


class NoTransformer(torch.nn.Module):
    """In place of a transformer where only the class of its layers matters."""

    num_layers = 99

    def __init__(self, *args: object):
        super().__init__()
        self.model = torch.nn.Module()

    def load_state_dict(self, *args: object, **kwargs: object) -> tuple[list, list]:
        return [], []


def reads_codes(route: Route) -> bool:
    """Whether the ComfyUI of this process builds an encoder of layers that read codes, when its file is quantized."""
    import comfy.sd
    import comfy.sd1_clip

    states = [
        dict.fromkeys(shapes, torch.empty(1, device="meta"))
        for shapes, _ in encoders(route.type, route.files)
    ]
    states[route.about]["any.comfy_quant"] = torch.empty(1, dtype=torch.uint8)
    clip_model = comfy.sd1_clip.SDClipModel.__init__

    def no_transformer(self, *args, **kwargs):
        clip_model(self, *args, **{**kwargs, "model_class": NoTransformer})

    with (
        mock.patch.object(comfy.sd1_clip.SDClipModel, "__init__", no_transformer),
        without_memory(*route.files),
    ):
        clip = comfy.sd.load_text_encoder_state_dicts(
            states, clip_type=comfy.sd.CLIPType[route.type]
        )
    return parts_of(clip)[route.about].operations.__name__ == "MixedPrecisionOps"


def published(kind: str, name: str, type: str) -> str:
    if not kind.startswith(("QWEN3VL", "QWEN35")) or kind in OWN_NAMES:
        return name
    # For Flux.2 ComfyUI leaves the names as they are, and would find no layer under theirs.
    changed = {"visual.": "model.visual."} if type == "FLUX2" else PUBLISHED
    for ours, theirs in changed.items():
        if name.startswith(ours) and not name.startswith("model.lm_head"):
            return theirs + name[len(ours) :]
    return name
