"""Every diffusion model class of ComfyUI a few megabytes large, with random weights, and what to call it with.

Names, blocks and connections are ComfyUI's own; only widths and counts are small. Where ComfyUI takes a width from a
table instead of from the file, or tells classes apart by one, `recognised_as_small` says it in its place: after
detection looked at the file. No part of FewBits is used here: the process without it calls this too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from support.model_classes import BESIDE, CONFIGS, FILE_PREFIX, NEWER, diffusion_model_class

STATED = CONFIGS | NEWER
UNET = {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1], "context_dim": 128,
}  # fmt: skip
THREE_LEVELS = {
    **UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
}  # fmt: skip
KOALA = {
    **UNET, "num_res_blocks": [1, 1, 1], "channel_mult": [1, 2, 2], "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
}  # fmt: skip
FLUX = {
    "hidden_size": 256,
    "num_heads": 2,
    "context_in_dim": 128,
    "depth": 1,
    "depth_single_blocks": 1,
}
CHROMA = {**FLUX, "in_dim": 64, "out_dim": 256, "hidden_dim": 128, "n_layers": 1}
HUNYUAN = {**FLUX, "vec_in_dim": 128}
WAN = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": 128}
PREDICT2 = {
    "model_channels": 256,
    "num_heads": 2,
    "crossattn_emb_channels": 128,
    "num_blocks": 2,
    "adaln_lora_dim": 64,
}
COSMOS = {**PREDICT2, "num_blocks": 1}
LUMINA = {
    "dim": 384, "n_heads": 4, "n_kv_heads": 2, "cap_feat_dim": 128, "ffn_dim_multiplier": 0.5, "n_refiner_layers": 1,
}  # fmt: skip
Z_IMAGE = {**LUMINA, "dim": 256, "n_heads": 2, "n_kv_heads": 2}
STABLE_AUDIO = {"embed_dim": 256, "num_heads": 4, "cond_token_dim": 128, "global_cond_dim": 128}
PIXART = {
    "hidden_size": 384,
    "num_heads": 4,
    "caption_channels": 128,
    "input_size": 16,
    "pe_interpolation": 1,
}
HYDIT = {
    "hidden_size": 256,
    "depth": 2,
    "num_heads": 2,
    "text_states_dim": 128,
    "text_states_dim_t5": 128,
}
COG = {"num_attention_heads": 4, "time_embed_dim": 128, "text_embed_dim": 128}
PIXELDIT = {
    "num_groups": 2, "hidden_size": 256, "pixel_attn_hidden_size": 64, "pixel_num_groups": 2, "patch_depth": 2,
    "pixel_depth": 1, "txt_embed_dim": 128, "txt_max_length": 8,
}  # fmt: skip
KANDINSKY = {
    "model_dim": 256, "ff_dim": 512, "time_dim": 128, "in_text_dim": 128, "in_text_dim2": 128, "axes_dims": (16, 24, 24),
}  # fmt: skip
SAM3 = {
    "embed_dim": 256, "num_queries": 16, "depth": 2, "global_att_blocks": (1,), "img_size": 112, "pretrain_img_size": 112,
    "window_size": 4,
}  # fmt: skip

# Class of comfy.supported_models -> what is smaller than in support.model_classes.
SMALL = {
    **dict.fromkeys(("LotusD", "Stable_Zero123", "SD15_instructpix2pix", "SD15", "SD20"), UNET),
    **dict.fromkeys(("SD21UnclipL", "SD21UnclipH"), {**UNET, "adm_in_channels": 128}),
    **dict.fromkeys(("SDXL", "SDXL_instructpix2pix"), {**THREE_LEVELS, "adm_in_channels": 128}),
    "SDXLRefiner": {
        **THREE_LEVELS, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 2, 2], "adm_in_channels": 128,
        "transformer_depth": [0, 0, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    **dict.fromkeys(("SSD1B", "Segmind_Vega"), {**THREE_LEVELS, "transformer_depth_middle": -1, "adm_in_channels": 128}),
    "KOALA_700M": {**KOALA, "transformer_depth_middle": -2, "adm_in_channels": 128},
    "KOALA_1B": {**KOALA, "adm_in_channels": 128},
    "SD_X4Upscaler": {
        **UNET, "num_res_blocks": [2, 2], "channel_mult": [1, 2], "transformer_depth": [0, 0, 1, 1],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1], "disable_self_attentions": [True, False],
    },
    **dict.fromkeys(("SVD_img2vid", "SV3D_u", "SV3D_p"), {**UNET, "adm_in_channels": 128}),
    "Stable_Cascade_C": {"c_cond": 128, "c_hidden": [128, 128], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
                         "c_clip_text": 128, "c_clip_text_pooled": 128, "c_clip_img": 128},
    "Stable_Cascade_B": {"c_cond": 128, "c_hidden": [64, 64, 128, 128], "nhead": [-1, -1, 2, 2],
                         "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]], "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]], "c_clip": 128},
    "StableAudio": STABLE_AUDIO, "StableAudio3": STABLE_AUDIO,
    "AuraFlow": {"dim": 256, "n_heads": 2, "global_conddim": 256, "max_seq": 64, "n_double_layers": 1, "n_layers": 2},
    "PixArtAlpha": {**PIXART, "model_max_length": 8}, "PixArtSigma": {**PIXART, "model_max_length": 8},
    "HunyuanDiT": HYDIT, "HunyuanDiT1": HYDIT,
    "SD3": {"depth": 4, "adm_in_channels": 128, "num_patches": 64, "pos_embed_max_size": 8, "context_size": 128,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 128, "out_features": 256}}},
    **dict.fromkeys(("Flux", "FluxInpaint", "FluxSchnell"), {**FLUX, "vec_in_dim": 128}),
    "Flux2": FLUX, "LongCatImage": {**FLUX, "context_in_dim": 3584},
    "Lens": {"num_attention_heads": 4, "enc_hidden_dim": 128, "num_layers": 2},
    "GenmoMochi": {"hidden_size_x": 256, "hidden_size_y": 128, "mlp_ratio_x": 48.0, "num_heads": 2, "t5_feat_dim": 128, "t5_token_length": 8},
    "LTXV": {"num_attention_heads": 4, "attention_head_dim": 64, "cross_attention_dim": 256, "caption_channels": 128},
    "LTXAV": {"num_attention_heads": 2, "attention_head_dim": 128, "audio_num_attention_heads": 2, "cross_attention_dim": 256,
              "audio_cross_attention_dim": 128, "caption_channels": 128, "connector_num_attention_heads": 1,
              "audio_connector_num_attention_heads": 1, "connector_num_layers": 1},
    "MiniMaxH3": {"hidden_size": 256, "num_attention_heads": 2, "ffn_hidden_size": 256, "text_dim": 128,
                  "time_embed_hidden_size": 128, "time_embed_dim": 128},
    **dict.fromkeys(("HunyuanVideo", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V"), HUNYUAN),
    **dict.fromkeys(("HunyuanImage21", "HunyuanImage21Refiner"), {**HUNYUAN, "vec_in_dim": None}),
    **dict.fromkeys(("HunyuanVideo15", "HunyuanVideo15_SR_Distilled"),
                    {**HUNYUAN, "vec_in_dim": None, "depth": 2, "depth_single_blocks": 0}),
    "CosmosT2V": COSMOS, "CosmosI2V": COSMOS, "CosmosT2IPredict2": PREDICT2, "CosmosI2VPredict2": PREDICT2,
    "Anima": PREDICT2, "Lumina2": LUMINA, "ZImage": Z_IMAGE,
    "ZImagePixelSpace": {**Z_IMAGE, "patch_size": 4, "decoder_hidden_size": 128, "decoder_num_res_blocks": 2,
                         "decoder_in_channels": 48},
    "PixelDiTT2I": PIXELDIT,
    "PiD": {**PIXELDIT, "lq_hidden_dim": 64, "lq_num_res_blocks": 1},
    **dict.fromkeys((name for name in STATED if name.startswith("WAN")), WAN),
    "WAN21_Vace": {**WAN, "vace_layers": 2}, "WAN22_Animate": {**WAN, "num_layers": 6, "motion_encoder_dim": 128},
    "WAN22_S2V": {**WAN, "audio_dim": 128, "audio_inject_layers": [0]},
    "WAN22_WanDancer": {**WAN, "audio_inject_layers": [0]},
    "Hunyuan3Dv2": {"hidden_size": 256, "num_heads": 2, "context_in_dim": 128, "depth": 1, "depth_single_blocks": 1},
    "Hunyuan3Dv2mini": {"hidden_size": 256, "num_heads": 2, "context_in_dim": 128, "depth_single_blocks": 1},
    "Hunyuan3Dv2_1": {"hidden_size": 256, "context_dim": 128, "depth": 3, "num_heads": 2, "num_moe_layers": 1,
                      "num_experts": 2},
    "Trellis2": {"resolution": 16, "num_blocks": 1, "model_channels": 128, "cond_channels": 128, "num_heads": 2},
    "TripoSplat": {"q_token_length": 16, "model_channels": 256, "cond_channels": 128, "num_blocks": 2,
                   "num_refiner_blocks": 1},
    "HiDream": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "caption_channels": [128, 128],
                "text_emb_dim": 128, "llama_layers": [0, 1]},
    "HiDreamO1": {
        "text_config_overrides": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
                                  "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64},
        "vision_config_overrides": {"hidden_size": 128, "intermediate_size": 256, "depth": 1, "num_heads": 2},
    },
    "Chroma": CHROMA,
    "ChromaRadiance": {**CHROMA, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1},
    "SeedVR2": {"vid_dim": 128, "heads": 1, "txt_in_dim": 128, "expand_ratio": 1},
    "ACEStep": {"inner_dim": 256, "num_attention_heads": 2, "num_layers": 2, "text_embedding_dim": 128,
                "speaker_embedding_dim": 128, "ssl_latent_dims": [64, 64], "lyric_hidden_size": 128,
                "lyric_encoder_vocab_size": 64},
    "ACEStep15": {"hidden_size": 256, "text_hidden_dim": 128, "num_lyric_layers": 1, "num_timbre_layers": 1,
                  "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 512, "fsq_dim": 256,
                  "encoder_hidden_size": 256, "encoder_intermediate_size": 512, "encoder_num_heads": 2},
    "Omnigen2": {"hidden_size": 240, "num_attention_heads": 2, "num_kv_heads": 1, "text_feat_dim": 128,
                 "num_refiner_layers": 1},
    "Boogu": {"hidden_size": 240, "num_attention_heads": 2, "num_kv_heads": 1, "instruction_feat_dim": 128,
              "num_refiner_layers": 1, "num_double_stream_layers": 1},
    "MageFlow": {"num_attention_heads": 2}, "QwenImage": {"num_attention_heads": 2, "joint_attention_dim": 128},
    "JoyImage": {"hidden_size": 256, "num_attention_heads": 2, "text_dim": 128},
    "Ideogram4": {"num_attention_heads": 2, "attention_head_dim": 128, "intermediate_size": 256, "adaln_dim": 128,
                  "llm_features_dim": 128},
    "Krea2": {"features": 256, "heads": 2, "kvheads": 1, "txtdim": 128, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2},
    "Kandinsky5": KANDINSKY, "Kandinsky5Image": KANDINSKY,
    "RT_DETR_v4": {"num_queries": 20}, "SAM3": SAM3, "SAM31": SAM3,
    "DepthAnything3": {"backbone_name": "vits", "head_dim_in": 384, "head_features": 32, "out_layers": (5, 7, 9, 11),
                       "head_out_channels": [32, 32, 32, 32]},
    "ErnieImage": {"hidden_size": 256, "num_attention_heads": 2, "ffn_hidden_size": 512, "text_in_dim": 128},
    **dict.fromkeys(("CogVideoX_T2V", "CogVideoX_I2V", "CogVideoX_Inpaint"), COG),
}  # fmt: skip
# What classes are told apart by, and too large to be kept: ComfyUI is shown the real value.
UNET_WIDTHS = ("context_dim", "model_channels", "transformer_depth", "adm_in_channels")
SHOWN = {
    **dict.fromkeys(
        (name for name, config in SMALL.items() if config.get("channel_mult")), UNET_WIDTHS
    ),
    "HunyuanDiT1": ("image_model",),
    "ZImage": ("dim",),
    "ZImagePixelSpace": ("image_model",),
    "Kandinsky5Image": ("model_dim",),
    "DepthAnything3": ("image_model",),
}
# What a file's metadata says of its class.
METADATA = {
    "WAN21_CausalAR_T2V": {"config": json.dumps({"transformer": {"causal_ar": True}})},
    "WAN21_FlowRVS": {"config": json.dumps({"transformer": {"model_type": "flow_rvs"}})},
    "WAN_Animate2": {"config": json.dumps({"transformer": {"model_type": "animate2"}})},
}
# Weights beside the diffusion model's that ComfyUI does not do without.
SECONDS = {"embedder.embedding.0.weights": (128,), "embedder.embedding.1.weight": (768, 257),
           "embedder.embedding.1.bias": (768,)}  # fmt: skip
AROUND = {
    "StableAudio": {
        f"conditioner.conditioners.{name}.{key}": shape
        for name in ("seconds_start", "seconds_total")
        for key, shape in SECONDS.items()
    },
    "StableAudio3": {
        "conditioner.conditioners.seconds_total.embedder.embedding.1.weight": (768, 256),
        "conditioner.conditioners.seconds_total.embedder.embedding.1.bias": (768,),
    },
}
# Parts with widths of their own, which no argument of the model reaches: module, class, arguments.
PARTS = {
    "Anima": [("comfy.ldm.anima.model", "LLMAdapter",
               {"source_dim": 128, "target_dim": 128, "model_dim": 128, "num_layers": 2, "num_heads": 2})],
    "WAN21_HuMo": [("comfy.ldm.wan.model", "AudioProjModel", {"intermediate_dim": 64})],
    "ACEStep": [("comfy.ldm.ace.model", "LyricEncoder",
                 {"output_size": 128, "attention_heads": 2, "linear_units": 256, "num_blocks": 1})],
    **dict.fromkeys(("SAM3", "SAM31"), [
        ("comfy.ldm.sam3.detector", "Transformer", {"dim_ff": 256, "enc_layers": 1, "dec_layers": 2}),
        ("comfy.ldm.sam3.detector", "GeometryEncoder", {"num_layers": 1, "roi_size": 3}),
    ]),
    "RT_DETR_v4": [("comfy.ldm.rt_detr.rtdetr_v4", "HybridEncoder", {"eval_spatial_size": (64, 64)}),
                   ("comfy.ldm.rt_detr.rtdetr_v4", "DFINETransformer", {"eval_spatial_size": (64, 64)})],
}  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A class of comfy.supported_models as a small file: `tensors` are bf16, named as in files."""

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def build(name: str) -> Tiny:
    """A class with random weights: matrices randn / sqrt(fan in), norms one, biases zero."""
    import comfy.ops
    import comfy.supported_models

    cls = getattr(comfy.supported_models, name)
    made = cls({**STATED[name], **cls.unet_config, "dtype": torch.bfloat16})
    beside = {**BESIDE.get(name, {}), **AROUND.get(name, {})}
    unet = diffusion_model_class(made, beside)
    config = {**made.unet_config, **SMALL[name]}
    with small_parts(name):
        module = unet(**config, device="cpu", operations=comfy.ops.disable_weight_init)
    prefix = FILE_PREFIX.get(name, "")
    state = {prefix + key: tensor for key, tensor in module.state_dict().items()}
    state |= {key: torch.empty(shape) for key, shape in beside.items()}
    tensors = {key: random_like(key, value) for key, value in state.items()}
    return Tiny(name, fused(name, tensors), METADATA.get(name))


def fused(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as they are published, where ComfyUI cuts them while loading."""
    if name.startswith("Stable_Cascade"):
        return joined(tensors, ".attention.attn.", ("to_q", "to_k", "to_v"))
    if name.startswith("SAM3"):
        return joined(tensors, ".", ("q_proj", "k_proj", "v_proj"), inside="detector.transformer.")
    if name in ("PixelDiTT2I", "PiD"):
        return interleaved(tensors)
    return tensors


def joined(
    tensors: dict[str, torch.Tensor], before: str, parts: tuple[str, ...], inside: str = ""
) -> dict[str, torch.Tensor]:
    """Rows of three layers under one name, `in_proj_weight` and `in_proj_bias`."""
    made = dict(tensors)
    for name in tensors:
        base, found, rest = name.partition(f"{before}{parts[0]}.")
        if found and name.startswith(inside):
            whole = torch.cat([made.pop(f"{base}{before}{part}.{rest}") for part in parts])
            made[f"{base}{before}in_proj_{rest}"] = whole
    return made


def interleaved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both modulations of a pixel block as one layer, three rows of each in turn."""
    made = dict(tensors)
    width = next(t for n, t in tensors.items() if n.endswith("pixel_embedder.proj.weight")).shape[0]
    for name in tensors:
        base, found, rest = name.partition(".adaLN_modulation_msa.")
        if not found:
            continue
        halves = [made.pop(f"{base}.adaLN_modulation_{part}.{rest}") for part in ("msa", "mlp")]
        trail = halves[0].shape[1:]
        rows = [half.reshape(-1, 3, width, *trail) for half in halves]
        made[f"{base}.adaLN_modulation.0.{rest}"] = torch.cat(rows, 1).reshape(-1, *trail)
    return made


def random_like(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Values of a generator of its own, so that a name and a shape say them everywhere."""
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device="cpu")
    if name.endswith("bias"):
        return torch.zeros(tensor.shape, dtype=torch.bfloat16)
    if tensor.ndim < 2:
        return torch.ones(tensor.shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    fan_in = torch.Size(tensor.shape[1:]).numel()
    return (torch.randn(tensor.shape, generator=generator) / fan_in**0.5).to(torch.bfloat16)


@contextlib.contextmanager
def recognised_as_small(name: str) -> Iterator[list]:
    """ComfyUI's loaders build this class in its small widths, after they recognised the file themselves.

    Yields:
        the configurations that detection made of the files loaded inside.
    """
    import comfy.model_detection as detection
    import comfy.supported_models

    cls = getattr(comfy.supported_models, name)
    stated = {**STATED[name], **cls.unet_config, **SMALL[name]}
    small = {key: stated[key] for key in (*STATED[name], *SMALL[name])}
    shown = {key: cls.unet_config[key] for key in SHOWN.get(name, ()) if key in cls.unet_config}
    original, seen = detection.model_config_from_unet_config, []

    def matched(unet_config: dict, *args: object, **kwargs: object) -> object:
        seen.append(dict(unet_config))
        config = original({**unet_config, **shown}, *args, **kwargs)
        if config is not None:
            config.unet_config = {**config.unet_config, **small}
        return config

    with mock.patch.object(detection, "model_config_from_unet_config", matched), small_parts(name):
        yield seen


@contextlib.contextmanager
def small_parts(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, part, arguments in PARTS.get(name, ()):
            owner = importlib.import_module(module)
            small = with_arguments(getattr(owner, part), arguments)
            stack.enter_context(mock.patch.object(owner, part, small))
        yield


def with_arguments(cls: type, arguments: dict[str, object]) -> Callable:
    return lambda *args, **kwargs: cls(*args, **{**kwargs, **arguments})


def forward(model: object, name: str) -> torch.Tensor:
    """The output of a MODEL's diffusion model for fixed inputs, as one vector."""
    unet = model.model.diffusion_model
    say = Inputs(name, model.model.model_config.unet_config)
    call = next(CALLS[part.__name__] for part in type(unet).__mro__ if part.__name__ in CALLS)
    with torch.inference_mode():
        made = call(say)
        arguments, named = made if isinstance(made, tuple) else ((), made)
        return flat(unet(*arguments, **named))


def flat(output: object) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output.flatten().float()
    parts = output.values() if isinstance(output, dict) else output
    return torch.cat([flat(part) for part in parts if part is not None])


class Inputs:
    """Random tensors by shape, and the configuration that says how wide they have to be."""

    def __init__(self, name: str, config: dict):
        self.name, self.config = name, config
        self.generator = torch.Generator().manual_seed(7)

    def __getattr__(self, key: str) -> object:
        return self.config[key]

    def get(self, key: str, default: object = None) -> object:
        return self.config.get(key, default)

    def tensor(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def time(self, value: float = 0.5) -> torch.Tensor:
        return torch.full((1,), value)


TOKENS = 7  # of text


def unet(say: Inputs) -> dict:
    frames = 2 if say.get("use_temporal_resblock") else 1
    made = {
        "x": say.tensor(frames, say.in_channels, 16, 16),
        "timesteps": torch.full((frames,), 500.0),
        "context": say.tensor(frames, TOKENS, say.context_dim),
    }
    if say.get("num_classes") == "sequential":
        made["y"] = say.tensor(frames, say.adm_in_channels)
    elif say.get("num_classes"):
        made["y"] = torch.tensor([3])
    if frames > 1:
        made |= {"num_video_frames": frames, "image_only_indicator": torch.zeros(1, frames)}
    return made


def image(say: Inputs, channels: int, width: int, size: int = 8, **more: object) -> dict:
    """Named as most classes do: x, timestep, context."""
    return {
        "x": say.tensor(1, channels, size, size),
        "timestep": say.time(),
        "context": say.tensor(1, TOKENS, width),
        **more,
    }


def video(say: Inputs, channels: int, width: int, frames: int = 2, **more: object) -> dict:
    return {**image(say, channels, width, **more), "x": say.tensor(1, channels, frames, 8, 8)}


def renamed(made: dict, **names: str) -> dict:
    return {names.get(key, key): value for key, value in made.items()}


def flux(say: Inputs) -> dict:
    made = image(say, say.in_channels, say.context_in_dim, guidance=say.time(3.5))
    return {**made, "y": say.tensor(1, say.vec_in_dim)} if say.get("vec_in_dim") else made


def hunyuan_video(say: Inputs) -> dict:
    still = len(say.patch_size) == 2
    make = image if still else video
    made = make(say, say.in_channels, say.context_in_dim, guidance=say.time(6.0))
    if say.vec_in_dim:
        made["y"] = say.tensor(1, say.vec_in_dim)
    if say.byt5:
        made["txt_byt5"] = say.tensor(1, 3, 1472)
    if say.vision_in_dim:
        made["clip_fea"] = say.tensor(1, 4, say.vision_in_dim)
    return made


def wan(say: Inputs) -> dict:
    kind = say.model_type
    made = video(say, say.in_dim, say.text_dim, frames=3 if kind == "wandancer" else 2)
    if kind in ("i2v", "camera", "animate", "animate2", "scail", "scail2", "wandancer"):
        made["clip_fea"] = say.tensor(1, 5, 1280)
    if kind == "vace":
        made |= {"vace_context": say.tensor(1, 1, say.vace_in_dim, 2, 8, 8), "vace_strength": [1.0]}
    if kind.startswith("camera"):
        made["camera_conditions"] = say.tensor(1, 24, 2, 64, 64)
    if kind == "wandancer":
        made["audio_embed"] = say.tensor(1, 24, 35)
    return made


CALLS: dict[str, Callable[[Inputs], dict | tuple]] = {
    "UNetModel": unet,
    "OpenAISignatureMMDITWrapper": lambda say: {
        **renamed(image(say, 16, 128), timestep="timesteps"),
        "y": say.tensor(1, say.adm_in_channels),
    },
    "StageC": lambda say: {
        "x": say.tensor(1, 16, 8, 8),
        "r": say.time(),
        "clip_text": say.tensor(1, TOKENS, say.c_clip_text),
        "clip_text_pooled": say.tensor(1, 1, say.c_clip_text_pooled),
        "clip_img": say.tensor(1, 1, say.c_clip_img),
    },
    "StageB": lambda say: {
        "x": say.tensor(1, 4, 32, 32),
        "r": say.time(),
        "effnet": say.tensor(1, 16, 4, 4),
        "clip": say.tensor(1, 1, say.c_clip),
    },
    "AudioDiffusionTransformer": lambda say: {
        "x": say.tensor(1, say.io_channels, 16),
        "timestep": say.time(),
        "context": say.tensor(1, TOKENS, say.cond_token_dim),
        "global_embed": say.tensor(1, say.global_cond_dim),
    },
    "MMDiT": lambda say: image(say, 4, say.cond_seq_dim),
    "PixArtMS": lambda say: {
        **renamed(image(say, say.in_channels, say.caption_channels, size=64), timestep="timesteps"),
        "c_size": torch.tensor([[512.0, 512.0]]),
        "c_ar": torch.tensor([[1.0]]),
    },
    "HunYuanDiT": lambda say: {
        "x": say.tensor(1, 4, 8, 8),
        "t": say.time(),
        "context": say.tensor(1, 77, say.text_states_dim),
        "text_embedding_mask": torch.ones(1, 77),
        "encoder_hidden_states_t5": say.tensor(1, 256, say.text_states_dim_t5),
        "text_embedding_mask_t5": torch.ones(1, 256),
        "image_meta_size": torch.tensor([[1024.0, 1024.0, 1024.0, 1024.0, 0.0, 0.0]]),
    },
    "Flux": flux,
    "Chroma": lambda say: image(
        say, 16 if say.patch_size == 2 else 3, say.context_in_dim, size=16, guidance=say.time(0.0)
    ),
    "LensTransformer2DModel": lambda say: image(
        say, say.get("in_channels", 128), say.enc_hidden_dim * 4
    ),
    "AsymmDiTJoint": lambda say: video(
        say, 12, say.t5_feat_dim, attention_mask=torch.ones(1, TOKENS)
    ),
    "LTXAVModel": lambda say: {
        **image(say, 1, 2 * say.caption_channels, attention_mask=None, frame_rate=25),
        "x": [say.tensor(1, 128, 2, 8, 8), say.tensor(1, 8, 6, 16)],
    },
    "LTXVModel": lambda say: video(
        say, 128, say.caption_channels, attention_mask=None, frame_rate=25
    ),
    "MiniMaxH3Model": lambda say: {
        **image(say, 1, say.text_dim),
        "x": [say.tensor(1, 24, 2, 8, 8), say.tensor(1, 32, 2, 6)],
    },
    "HunyuanVideo": hunyuan_video,
    "GeneralDIT": lambda say: renamed(
        video(say, say.in_channels, say.crossattn_emb_channels), timestep="timesteps"
    ),
    "MiniTrainDIT": lambda say: renamed(
        video(say, say.in_channels, say.crossattn_emb_channels), timestep="timesteps"
    ),
    "NextDiT": lambda say: renamed(
        image(say, say.in_channels, say.cap_feat_dim, num_tokens=TOKENS), timestep="timesteps"
    ),
    "PidNet": lambda say: {
        **renamed(image(say, 3, say.txt_embed_dim, size=32), timestep="timesteps"),
        "lq_latent": say.tensor(1, 16, 2, 2),
        "degrade_sigma": say.time(0.1),
    },
    "PixDiT_T2I": lambda say: renamed(
        image(say, 3, say.txt_embed_dim, size=32), timestep="timesteps"
    ),
    "WanModel": wan,
    "Hunyuan3Dv2": lambda say: {
        **image(say, 1, say.context_in_dim),
        "x": say.tensor(1, say.get("in_channels", 64), 12),
    },
    "HunYuanDiTPlain": lambda say: {
        "x": say.tensor(2, say.get("in_channels", 64), 12),
        "t": torch.tensor([0.5, 0.5]),
        "context": say.tensor(2, TOKENS, say.context_dim),
    },
    "HiDreamImageTransformer2DModel": lambda say: {
        "x": say.tensor(1, 16, 8, 8),
        "t": say.time(),
        "y": say.tensor(1, say.text_emb_dim),
        "context": say.tensor(1, TOKENS, 128),
        "encoder_hidden_states_llama3": say.tensor(1, 2, TOKENS, 128),
    },
    "OmniGen2Transformer2DModel": lambda say: renamed(
        image(say, 16, say.text_feat_dim, num_tokens=TOKENS), timestep="timesteps"
    ),
    "BooguTransformer2DModel": lambda say: renamed(
        image(say, 16, say.instruction_feat_dim, num_tokens=TOKENS), timestep="timesteps"
    ),
    "MageFlowTransformer2DModel": lambda say: image(say, 128, 2560),
    "QwenImageTransformer2DModel": lambda say: video(say, 16, say.joint_attention_dim, frames=1),
    "JoyImageTransformer3DModel": lambda say: renamed(
        video(say, 16, say.text_dim), x="hidden_states"
    ),
    "Ideogram4Transformer2DModel": lambda say: renamed(
        image(say, 128, say.llm_features_dim), timestep="timesteps"
    ),
    "SingleStreamDiT": lambda say: renamed(
        image(say, 16, say.txtdim * say.txtlayers), timestep="timesteps"
    ),
    "Kandinsky5": lambda say: {
        **video(say, say.visual_embed_dim // 4, say.in_text_dim),
        "y": say.tensor(1, say.in_text_dim2),
    },
    "CogVideoXTransformer3DModel": lambda say: video(say, say.in_channels, say.text_embed_dim),
    "ErnieImageModel": lambda say: renamed(image(say, 128, say.text_in_dim), timestep="timesteps"),
    "ACEStepTransformer2DModel": lambda say: {
        **image(say, 8, say.text_embedding_dim),
        "x": say.tensor(1, 8, 16, 12),
        "lyric_token_idx": torch.tensor([[1, 2, 3]]),
        "speaker_embeds": say.tensor(1, say.speaker_embedding_dim),
    },
    "AceStepConditionGenerationModel": lambda say: {
        "x": say.tensor(1, 64, 16),
        "timestep": say.time(),
        "context": say.tensor(1, TOKENS, say.text_hidden_dim),
        "lyric_embed": say.tensor(1, 3, say.text_hidden_dim),
        "refer_audio": say.tensor(1, 64, 20),
    },
    "NaDiT": lambda say: {
        **video(say, 16, say.txt_in_dim),
        "condition": say.tensor(1, 17, 2, 8, 8),
        "transformer_options": {"cond_or_uncond": [0]},
    },
    "Trellis2": lambda say: {
        **image(say, 8, say.cond_channels),
        "x": say.tensor(1, 8, 16, 16, 16),
        "embeds": say.tensor(1, TOKENS, say.cond_channels),
    },
    "LatentSeqMMFlowModel": lambda say: {
        "x": [say.tensor(1, 16, 16), say.tensor(1, 1, 5)],
        "t": say.time(),
        "context": say.tensor(1, TOKENS, say.cond_channels),
    },
    "HiDreamO1Transformer": lambda say: {
        "x": say.tensor(1, 3, 64, 64),
        "timesteps": say.time(500.0),
        "input_ids": torch.tensor([[1, 2, 3, 4]]),
        "position_ids": torch.arange(8).expand(1, 3, 8),
        "vinput_mask": torch.tensor([[False] * 4 + [True] * 4]),
        "ar_len": 4,
    },
    "RTv4": lambda say: {"x": say.tensor(1, 3, 64, 64)},
    "DepthAnything3Net": lambda say: {"image": say.tensor(1, 3, 28, 28)},
    "SAM3Model": lambda say: {
        "images": say.tensor(1, 3, 112, 112),
        "text_embeddings": say.tensor(1, TOKENS, say.embed_dim),
        "text_mask": torch.ones(1, TOKENS),
    },
}
