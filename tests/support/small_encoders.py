"""Every kind of text encoder that ComfyUI tells apart, small, with random weights: files for its own loader.

Names, blocks and connections are ComfyUI's own; widths and counts of blocks are small. The loader is told which kinds
the files are, as it tells them apart by their widths. No part of FewBits is used here: the process without it calls
this too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from support.tiny_encoders import (
    Route,
    described,
    no_tokenizer,
    parts_of,
    published,
    told_kinds,
)
from support.tiny_models import random_like, with_arguments

# What a text encoder's configuration says, whatever else it is.
CONFIG = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size_per_layer_input": 64,
    "num_kv_shared_layers": 2, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "num_global_key_value_heads": 1,
}  # fmt: skip
# In order of patterns of five and six: the last of them attends to everything.
PATTERN = {"num_hidden_layers": 6}
NARROW = {"hidden_size": 128, "intermediate_size": 128}
# Configuration class -> what differs. Where ComfyUI gives a file to an encoder by its width or its last block, that
# stays as it is.
OTHER_CONFIG = {
    "Gemma3_4B_Config": PATTERN,
    "Gemma3_4B_Vision_Config": PATTERN,
    "Gemma3_12B_Config": {**NARROW, "num_hidden_layers": 48},
    "Gemma4_E2B_Config": {"num_hidden_layers": 5},
    "Gemma4Config": PATTERN,
    "Gemma4_31B_Config": {**PATTERN, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "Gemma4_12B_Config": {**PATTERN, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "Qwen3_06B_ACE15_Config": {"hidden_size": 1024, "vocab_size": 336},
    "Qwen3_2B_ACE15_lm_Config": {"vocab_size": 352},
    "Qwen3_4B_ACE15_lm_Config": {"vocab_size": 352},
    "GptOss20BConfig": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "T5GemmaEncoderConfig": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "XLMRobertaConfig": {"num_attention_heads": 4},
}
CONFIGS = {
    "llama": ("Config",),
    "qwen35": ("Qwen35Config",),
    "gemma4": ("Config",),
    "gpt_oss": ("GptOss20BConfig",),
    "jina_clip_2": ("XLMRobertaConfig",),
    "sa3": ("T5GemmaEncoderConfig",),
}
# The same for encoders whose configuration is a JSON file, by that file's name.
CLIP = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "projection_dim": 128,
        "num_hidden_layers": 4}  # fmt: skip
T5 = {"vocab_size": 320, "d_model": 128, "d_kv": 64, "num_heads": 2, "num_layers": 4}
JSON = {
    "sd1_clip_config": CLIP,
    "clip_config_bigg": {**CLIP, "num_hidden_layers": 32},
    "sd2_clip_config": CLIP,
    "hydit_clip": {**CLIP, "max_position_embeddings": 77},
    "t5_config_xxl": {**T5, "num_layers": 24, "d_ff": 192},
    "umt5_config_xxl": {**T5, "num_layers": 24, "d_ff": 192},
    "t5_old_config_xxl": {**T5, "num_layers": 24, "d_ff": 128},
    "t5_pile_config_xl": {**T5, "d_ff": 160},
    "mt5_config_xl": {**T5, "d_ff": 160},
    "t5_config_base": {**T5, "d_ff": 128},
    "umt5_config_base": {**T5, "d_ff": 128},
    "byt5_config_small_glyph": {**T5, "d_ff": 128},
}
# Real rows -> rows here, of what FewBits tells text encoders apart by.
SMALL_ROWS = {10240: 192, 5120: 160, 151669: 336, 217204: 352}
# T5 divides no product of queries and keys by the root of their width, as its queries are small.
UNSCALED = "SelfAttention.q.weight"
VISION = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 64,
    "mm_embed_dim": 128, "output_proj_dims": 128,
}  # fmt: skip
TOWER = {"hidden_size": 128, "intermediate_size": 128, "depth": 2, "num_heads": 2}
TOKENS = [5, 17, 3, 211, 64, 9, 128]


@contextlib.contextmanager
def small(route: Route) -> Iterator[None]:
    """ComfyUI's loaders take files for the kinds of a route, and build their encoders small."""
    with contextlib.ExitStack() as stack:
        for name, endings in CONFIGS.items():
            for config in configurations(name, endings):
                stack.enter_context(mock.patch.object(config, "__init__", smaller(config)))
        for instead in towers():
            stack.enter_context(instead)
        stack.enter_context(small_clip_models())
        stack.enter_context(no_tokenizer())
        stack.enter_context(told_kinds(route.files))
        yield


def text_encoders(name: str) -> object:
    return importlib.import_module(f"comfy.text_encoders.{name}")


def configurations(module: str, endings: tuple[str, ...]) -> list[type]:
    owner = text_encoders(module)
    return [
        part
        for part in vars(owner).values()
        if isinstance(part, type)
        and part.__module__ == owner.__name__
        and part.__name__.endswith(endings)
    ]


def smaller(config: type) -> Callable:
    """The constructor of a configuration, which then has small values for what it has."""
    original = config.__init__
    values = {**CONFIG, **OTHER_CONFIG.get(config.__name__, {})}

    def __init__(self, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        if type(self) is not config:
            return
        for name, value in values.items():
            if getattr(self, name, None) is not None:
                setattr(self, name, value)
        for name in ("vision_config", "audio_config"):
            stated = getattr(self, name, None)
            if stated:
                fewer = {key: value for key, value in VISION.items() if key in stated}
                setattr(self, name, {**stated, **fewer})

    return __init__


def towers() -> Iterator[contextlib.AbstractContextManager]:
    """What makes the parts for pictures small."""
    qwen3vl, qwen35, llama, gpt_oss = map(text_encoders, ("qwen3vl", "qwen35", "llama", "gpt_oss"))
    tower = {**TOWER, "deepstack_visual_indexes": [0, 1]}
    yield mock.patch.dict(qwen3vl.QWEN3VL_VISION, dict.fromkeys(qwen3vl.QWEN3VL_VISION, tower))
    yield mock.patch.dict(qwen3vl.QWEN3VL_VISION_COMMON, {"num_heads": 2})
    yield mock.patch.dict(qwen35.QWEN35_VISION_DEFAULTS, TOWER)
    models = {
        name: {key: value for key, value in model.items() if key != "vision"}
        for name, model in qwen35.QWEN35_MODELS.items()
    }
    yield mock.patch.dict(qwen35.QWEN35_MODELS, models)
    transformer = llama.qwen_vl.Qwen2VLVisionTransformer
    widths = {"hidden_size": 128, "intermediate_size": 128, "num_heads": 2, "num_layers": 1}
    yield mock.patch.object(
        llama.qwen_vl, "Qwen2VLVisionTransformer", with_arguments(transformer, widths)
    )
    yield mock.patch.object(gpt_oss, "LENS_SELECTED_LAYERS", (0, 1, 3))
    yield mock.patch.object(gpt_oss, "LENS_TXT_OFFSET", 1)


@contextlib.contextmanager
def small_clip_models() -> Iterator[None]:
    """Configurations that ComfyUI reads from JSON files, and the blocks whose outputs are asked for."""
    from pathlib import Path

    import comfy.sd1_clip

    original = comfy.sd1_clip.SDClipModel.__init__
    usual = Path(comfy.sd1_clip.__file__).with_name("sd1_clip_config.json")

    def __init__(self, *args: object, layer: object = "last", **kwargs: object) -> None:
        config = kwargs.get("textmodel_json_config")
        if not isinstance(config, dict):
            path = Path(config or usual)
            stated = json.loads(path.read_text(encoding="utf-8"))
            kwargs["textmodel_json_config"] = {**stated, **JSON[path.stem]}
            if config is None:
                options = {"model_name": "clip_l", **(kwargs.get("model_options") or {})}
                kwargs["model_options"] = options
        else:
            kwargs["textmodel_json_config"] = {
                key: value for key, value in config.items() if key != "num_hidden_layers"
            }
        if isinstance(layer, list):
            layer = list(range(min(len(layer), 5)))
        original(self, *args, layer=layer, **kwargs)

    with mock.patch.object(comfy.sd1_clip.SDClipModel, "__init__", __init__):
        yield


@dataclasses.dataclass(frozen=True)
class SmallEncoder:
    """A text encoder's file: `tensors` are bf16, named as in published files."""

    tensors: dict[str, torch.Tensor]
    linears: frozenset[str]
    embeddings: frozenset[str]


def build(route: Route) -> list[SmallEncoder]:
    """The files of a route with random weights."""
    import comfy.sd

    nothing = lambda *args, **kwargs: ([], [])  # noqa: E731
    with (
        small(route),
        mock.patch.object(comfy.sd.CLIP, "load_sd", nothing),
        mock.patch.object(comfy.model_management, "load_models_gpu", nothing),
    ):
        clip = comfy.sd.load_text_encoder_state_dicts(
            [{} for _ in route.files], clip_type=comfy.sd.CLIPType[route.type]
        )
    modules = [part.transformer for part in parts_of(clip)]
    assert len(modules) == len(route.files)
    return [
        small_encoder(module, lambda name, kind=kind: published(kind, name, route.type))
        for module, kind in zip(modules, route.files, strict=True)
    ]


def small_encoder(module: torch.nn.Module, named: Callable[[str], str]) -> SmallEncoder:
    shapes, linears = described(module, named)
    tensors = {key: random_like(key, torch.empty(shape)) for key, shape in sorted(shapes.items())}
    for key in tensors:
        if key.endswith(UNSCALED):
            tensors[key] /= 8
    tables = {
        named(key) for key, part in module.named_modules() if isinstance(part, torch.nn.Embedding)
    }
    return SmallEncoder(tensors, linears, frozenset(tables))


def load(route: Route, paths: list[str]) -> object:
    """The CLIP that ComfyUI's own loader makes of files."""
    import comfy.sd

    with small(route):
        return comfy.sd.load_clip(paths, clip_type=comfy.sd.CLIPType[route.type])


def encode(clip: object) -> torch.Tensor:
    """What each text encoder of a CLIP makes of fixed tokens, as one vector."""
    clip.load_model()
    with torch.inference_mode():
        return torch.cat([flat(run(part)) for part in parts_of(clip)])


def run(part: torch.nn.Module) -> object:
    """The output of one text encoder; of its blocks alone where ComfyUI can only write text with it."""
    clip = type(part.transformer).__name__ == "CLIPTextModel"
    tokens = TOKENS * (part.max_length // len(TOKENS)) if clip else TOKENS
    if hasattr(part, "process_tokens"):
        embeds = part.process_tokens([tokens], "cpu")
        if isinstance(embeds, torch.Tensor):
            ids = torch.tensor([tokens])
            return part.transformer.model(None, embeds=embeds, dtype=torch.float32, input_ids=ids)
    return part.encode_token_weights([[(token, 1.0) for token in tokens]])


def flat(output: object) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output.flatten().float()
    parts = output.values() if isinstance(output, dict) else output
    found = [flat(part) for part in parts if isinstance(part, torch.Tensor | dict | list | tuple)]
    return torch.cat(found) if found else torch.empty(0)
