"""Every diffusion model class of ComfyUI with the arguments of a real file: real widths, few blocks, no memory.

A class is built as ComfyUI builds it (`supported_models.X(config).get_model`) on the meta device. Blocks that detection
counts are two; where it takes the depth from a table, the real depth stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

UNET = {
    "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "in_channels": 4,
    "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_temporal_resblock": False,
}  # fmt: skip
ADM = {**UNET, "num_classes": "sequential"}
SDXL = {
    **ADM, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
}  # fmt: skip
VIDEO_UNET = {
    **ADM, "in_channels": 8, "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_factor": 0.0,
    "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False,
    "use_temporal_resblock": True,
}  # fmt: skip
FLUX = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "context_in_dim": 4096, "hidden_size": 3072,
    "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0,
    "qkv_bias": True, "txt_ids_dims": [], "vec_in_dim": 768,
}  # fmt: skip
FLUX2 = {
    **FLUX, "in_channels": 128, "out_channels": 128, "patch_size": 1, "hidden_size": 6144, "context_in_dim": 15360,
    "num_heads": 48, "axes_dim": [32, 32, 32, 32], "theta": 2000, "mlp_ratio": 3.0, "global_modulation": True,
    "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "vec_in_dim": None, "guidance_embed": True,
    "txt_ids_dims": [3],
}  # fmt: skip
CHROMA = {
    **FLUX, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5,
    "vec_in_dim": None,
}  # fmt: skip
RADIANCE = {
    **CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64, "nerf_mlp_ratio": 4,
    "nerf_depth": 4, "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip
HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "context_in_dim": 4096, "hidden_size": 3072,
    "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "mlp_ratio": 4.0,
    "qkv_bias": True, "vec_in_dim": 768, "guidance_embed": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
HUNYUAN_IMAGE = {
    **HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "context_in_dim": 3584, "axes_dim": [64, 64],
    "vec_in_dim": None, "byt5": True,
}  # fmt: skip
HUNYUAN15 = {
    **HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "hidden_size": 2048, "num_heads": 16,
    "context_in_dim": 3584, "depth_single_blocks": 0, "vec_in_dim": None, "guidance_embed": False, "byt5": True,
    "use_cond_type_embedding": True, "meanflow_sum": True,
}  # fmt: skip
WAN = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 2, "in_dim": 16, "out_dim": 16}
COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "concat_padding_mask": True, "model_channels": 4096, "num_blocks": 2, "num_heads": 32, "pos_emb_cls": "rope3d",
    "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 256,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
PREDICT2 = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "concat_padding_mask": True, "model_channels": 2048, "num_blocks": 2, "num_heads": 16,
    "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "use_adaln_lora": True,
    "adaln_lora_dim": 256,
}  # fmt: skip
LUMINA = {
    "patch_size": 2, "in_channels": 16, "dim": 2304, "n_layers": 2, "n_heads": 24, "n_kv_heads": 8,
    "cap_feat_dim": 2304, "qk_norm": True, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512],
    "ffn_dim_multiplier": 4.0,
}  # fmt: skip
Z_IMAGE = {
    **LUMINA, "dim": 3840, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True,
    "pad_tokens_multiple": 32,
}  # fmt: skip
Z_IMAGE_PIXEL = {
    **Z_IMAGE, "patch_size": 32, "in_channels": 3, "decoder_hidden_size": 3840, "decoder_num_res_blocks": 4,
    "decoder_max_freqs": 8, "decoder_in_channels": 3072,
}  # fmt: skip
STABLE_AUDIO = {
    "io_channels": 64, "embed_dim": 1536, "cond_token_dim": 768, "project_cond_tokens": False, "global_cond_dim": 1536,
    "depth": 2, "num_heads": 24,
}  # fmt: skip
HIDREAM = {
    "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048,
    "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": [64, 32, 32], "max_resolution": [128, 128],
    "llama_layers": [0, 1, 2, 3],
}  # fmt: skip
MOCHI = {
    "depth": 2, "patch_size": 2, "num_heads": 24, "hidden_size_x": 3072, "hidden_size_y": 1536, "mlp_ratio_x": 4.0,
    "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True,
    "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
    "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 4096, "t5_token_length": 256,
    "rope_theta": 10000.0,
}  # fmt: skip
ACE = {
    "attention_head_dim": 128, "in_channels": 8, "inner_dim": 2560, "max_height": 16, "max_position": 32768,
    "max_width": 32768, "mlp_ratio": 2.5, "num_attention_heads": 20, "num_layers": 2, "out_channels": 8,
    "patch_size": [16, 1], "rope_theta": 1000000.0, "speaker_embedding_dim": 512, "text_embedding_dim": 768,
    "ssl_encoder_depths": [8, 8], "ssl_latent_dims": [1024, 768], "ssl_names": ["mert", "m-hubert"],
    "lyric_encoder_vocab_size": 6693, "lyric_hidden_size": 1024,
}  # fmt: skip
OMNIGEN = {
    "hidden_size": 2520, "num_layers": 2, "num_attention_heads": 21, "num_kv_heads": 7, "axes_dim_rope": [40, 40, 40],
    "axes_lens": [1024, 1664, 1664], "text_feat_dim": 2048, "timestep_scale": 1000.0,
}  # fmt: skip
SEEDVR2 = {
    "vid_dim": 2560, "heads": 20, "num_layers": 32, "norm_eps": 1e-05, "mlp_type": "swiglu", "vid_out_norm": True,
}  # fmt: skip
DEPTH3 = {
    "backbone_name": "vitl", "out_layers": [4, 11, 17, 23], "head_type": "dpt", "head_dim_in": 1024,
    "head_features": 256, "head_out_channels": [256, 512, 1024, 1024], "head_use_sky_head": True,
}  # fmt: skip
SD3 = {
    "input_size": None, "patch_size": 2, "out_channels": 16, "depth": 38, "num_blocks": 2, "adm_in_channels": 2048,
    "qk_norm": "rms", "num_patches": 36864, "pos_embed_max_size": 192,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}},
}  # fmt: skip
PIXART = {"num_heads": 16, "patch_size": 2, "hidden_size": 1152, "in_channels": 4, "depth": 2, "input_size": 128,
          "pe_interpolation": 2}  # fmt: skip
HYDIT = {"depth": 4, "hidden_size": 1408, "mlp_ratio": 4.3637}
KANDINSKY = {"time_dim": 512, "num_text_blocks": 1, "num_visual_blocks": 2}
COGVIDEO = {
    "num_attention_heads": 48, "attention_head_dim": 64, "time_embed_dim": 512, "num_layers": 2, "in_channels": 16,
    "patch_size": 2, "text_embed_dim": 4096, "use_rotary_positional_embeddings": True,
}  # fmt: skip

# Class of comfy.supported_models -> what its own `unet_config` leaves open.
CONFIGS = {
    "LotusD": ADM | {"context_dim": 1024}, "Stable_Zero123": UNET, "SD15_instructpix2pix": UNET, "SD15": UNET, "SD20": UNET,
    "SD21UnclipL": ADM, "SD21UnclipH": ADM, "SDXL_instructpix2pix": SDXL, "SDXL": SDXL,
    "SDXLRefiner": {**ADM, "model_channels": 384, "transformer_depth_middle": 4,
                    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0]},
    "SSD1B": {**SDXL, "transformer_depth_middle": -1, "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]},
    "Segmind_Vega": {**SDXL, "transformer_depth_middle": -1, "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2]},
    "KOALA_700M": {**SDXL, "num_res_blocks": [1, 1, 1], "transformer_depth_middle": -2,
                   "transformer_depth_output": [0, 0, 2, 2, 5, 5]},
    "KOALA_1B": {**SDXL, "num_res_blocks": [1, 1, 1], "transformer_depth_middle": 6,
                 "transformer_depth_output": [0, 0, 2, 2, 6, 6]},
    "SD_X4Upscaler": {**UNET, "channel_mult": [1, 2, 2, 4], "transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1],
                      "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]},
    "SVD_img2vid": VIDEO_UNET, "SV3D_u": VIDEO_UNET, "SV3D_p": VIDEO_UNET,
    "Stable_Cascade_C": {}, "Stable_Cascade_B": {},
    "StableAudio": STABLE_AUDIO,
    "StableAudio3": {**STABLE_AUDIO, "global_cond_type": "adaLN", "attn_kwargs": {"qk_norm": "rms", "differential": False},
                     "norm_type": "rms_norm", "num_memory_tokens": 64, "timestep_features_type": "expo"},
    "AuraFlow": {"max_seq": 4096, "n_double_layers": 2, "n_layers": 4},
    "PixArtAlpha": {**PIXART, "model_max_length": 120, "micro_condition": True},
    "PixArtSigma": {**PIXART, "model_max_length": 300, "micro_condition": False},
    "HunyuanDiT": HYDIT, "HunyuanDiT1": {**HYDIT, "size_cond": True, "use_style_cond": True},
    "SD3": SD3,
    "Flux": FLUX, "FluxInpaint": FLUX, "FluxSchnell": FLUX, "Flux2": FLUX2,
    "LongCatImage": {**FLUX, "txt_norm": False, "yak_mlp": False},
    "Lens": {"num_layers": 2, "num_attention_heads": 24}, "GenmoMochi": MOCHI,
    "LTXV": {"num_layers": 2, "attention_head_dim": 64, "cross_attention_dim": 2048},
    "LTXAV": {"num_layers": 2, "cross_attention_dim": 4096, "apply_gated_attention": True},
    "MiniMaxH3": {"num_layers": 2, "token_refiner_num_layers": 1},
    "HunyuanVideo": HUNYUAN, "HunyuanVideoI2V": HUNYUAN, "HunyuanVideoSkyreelsI2V": HUNYUAN,
    "HunyuanImage21": HUNYUAN_IMAGE, "HunyuanImage21Refiner": {**HUNYUAN_IMAGE, "axes_dim": [16, 56, 56], "in_channels": 128},
    "HunyuanVideo15": HUNYUAN15, "HunyuanVideo15_SR_Distilled": HUNYUAN15,
    "CosmosT2V": COSMOS, "CosmosI2V": COSMOS, "CosmosT2IPredict2": PREDICT2, "CosmosI2VPredict2": PREDICT2,
    "Anima": PREDICT2, "Lumina2": LUMINA, "ZImage": Z_IMAGE, "ZImagePixelSpace": Z_IMAGE_PIXEL,
    "PixelDiTT2I": {}, "PiD": {"lq_latent_channels": 16, "lq_hidden_dim": 512},
    "WAN21_T2V": WAN, "WAN21_CausalAR_T2V": WAN, "WAN21_I2V": WAN, "WAN21_FunControl2V": WAN, "WAN21_FlowRVS": WAN,
    "WAN22_T2V": {**WAN, "in_dim": 48}, "WAN21_Camera": WAN, "WAN22_Camera": WAN,
    "WAN21_Vace": {**WAN, "vace_layers": 2, "vace_in_dim": 96}, "WAN21_HuMo": {**WAN, "in_dim": 36}, "WAN22_S2V": WAN,
    "WAN22_Animate": {**WAN, "in_dim": 36, "num_layers": 10}, "WAN21_SCAIL": {**WAN, "in_dim": 20},
    "WAN21_SCAIL2": {**WAN, "in_dim": 20}, "WAN22_WanDancer": {**WAN, "num_layers": 28},
    "Hunyuan3Dv2": {"depth": 2, "depth_single_blocks": 2}, "Hunyuan3Dv2mini": {"depth_single_blocks": 2},
    "Hunyuan3Dv2_1": {"depth": 21, "guidance_cond_proj_dim": None}, "TripoSplat": {},
    "HiDream": HIDREAM, "HiDreamO1": {}, "Chroma": CHROMA, "ChromaRadiance": RADIANCE, "SeedVR2": SEEDVR2,
    "ACEStep": ACE,
    "ACEStep15": {"num_dit_layers": 2}, "Omnigen2": OMNIGEN,
    "Boogu": {"num_layers": 2, "num_double_stream_layers": 2}, "MageFlow": {"num_layers": 2},
    "QwenImage": {"num_layers": 2, "in_channels": 64}, "JoyImage": {"num_layers": 2}, "Ideogram4": {"num_layers": 2},
    "Krea2": {"layers": 2},
    "Kandinsky5": {**KANDINSKY, "model_dim": 1792, "ff_dim": 7168, "visual_embed_dim": 132, "axes_dims": (16, 24, 24)},
    "Kandinsky5Image": {**KANDINSKY, "ff_dim": 10240, "axes_dims": (32, 48, 48)},
    "RT_DETR_v4": {"enc_h": 256}, "DepthAnything3": DEPTH3, "ErnieImage": {"num_layers": 2}, "SAM3": {}, "SAM31": {},
    "CogVideoX_T2V": COGVIDEO, "CogVideoX_I2V": COGVIDEO, "CogVideoX_Inpaint": COGVIDEO,
}  # fmt: skip
# Classes that are newer than the ComfyUI that the tests pin.
NEWER = {
    "WAN_Animate2": {**WAN, "in_dim": 36}, "Trellis2": {"resolution": 64, "num_blocks": 2}, "MiniMaxMusic3": {},
}  # fmt: skip
# Tensors beside the model's own that ComfyUI reads to recognise a class.
BESIDE = {
    "Stable_Zero123": {"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)},
    "SeedVR2": {"positive_conditioning": (58, 5120), "negative_conditioning": (64, 5120)},
}

# Constructors that compute with numbers, which tensors without memory do not have; their layers stay uninitialised.
NEEDS_MEMORY = frozenset({"PixArtAlpha", "PixArtSigma", "RT_DETR_v4", "ACEStep15"})
# Classes that ComfyUI itself tells apart by a file's metadata only: what they are without it.
BY_METADATA = {
    "WAN21_CausalAR_T2V": "WAN21_T2V",
    "WAN21_FlowRVS": "WAN21_T2V",
    "WAN_Animate2": "WAN21_I2V",
}
# Names in files where the module's own differ.
FILE_PREFIX = {"PixelDiTT2I": "core.", "PiD": "net."}


class _Found(Exception):
    """The diffusion model class that a `supported_models` class would build."""

    def __init__(self, unet: type):
        self.unet = unet


@dataclass(frozen=True)
class Built:
    """A class as a header: shapes of its file, and what its modules are."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    linears: frozenset[str]
    embeddings: frozenset[str]


@cache
def build(cls: type) -> Built:
    """The diffusion model of a class of comfy.supported_models, without memory where that is possible."""
    return build_with(cls, {})


def build_with(cls: type, different: dict, without: tuple[str, ...] = ()) -> Built:
    """The same with other arguments of the model, and without some."""
    import comfy.ops

    name = cls.__name__
    stated = {**(CONFIGS | NEWER)[name], **cls.unet_config, **different, "dtype": torch.bfloat16}
    config = cls({key: value for key, value in stated.items() if key not in without})
    unet = diffusion_model_class(config, BESIDE.get(name, {}))
    device = "cpu" if name in NEEDS_MEMORY else "meta"
    with torch.device(device):
        module = unet(**config.unet_config, device=device, operations=comfy.ops.disable_weight_init)
    prefix = FILE_PREFIX.get(name, "")
    shapes = {prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}
    kinds = dict(module.named_modules())

    def named(kind: type) -> frozenset[str]:
        return frozenset(prefix + key for key, part in kinds.items() if isinstance(part, kind))

    return Built(
        name, shapes | BESIDE.get(name, {}), named(torch.nn.Linear), named(torch.nn.Embedding)
    )


def diffusion_model_class(config: object, beside: dict[str, tuple[int, ...]]) -> type:
    """The module that a config of comfy.supported_models builds."""
    import comfy.model_base

    def instead(self, model_config, *args, unet_model=comfy.model_base.UNetModel, **kwargs):
        modules = [value for value in args if isinstance(value, type)]
        raise _Found(modules[0] if modules else unet_model)

    original = comfy.model_base.BaseModel.__init__
    comfy.model_base.BaseModel.__init__ = instead
    try:
        config.get_model({key: torch.empty(shape, device="meta") for key, shape in beside.items()})
    except _Found as found:
        return found.unet
    finally:
        comfy.model_base.BaseModel.__init__ = original
    raise AssertionError(f"{config} builds no diffusion model")
