"""Key names and shapes of real models, read off ComfyUI's own classes on the meta device; widths are real, depth is not.

Blocks repeat, so two of each kind say everything about names; no memory is used and nothing is downloaded.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from fewbits.quant_ops.spec import Header, TensorSpec

FLUX = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "context_in_dim": 4096, "hidden_size": 3072,
        "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000,
        "mlp_ratio": 4.0, "qkv_bias": True, "txt_ids_dims": []}  # fmt: skip
CHROMA = {**FLUX, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120,
          "n_layers": 5, "vec_in_dim": None}  # fmt: skip
HUNYUAN = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "context_in_dim": 4096, "hidden_size": 3072,
           "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256,
           "mlp_ratio": 4.0, "qkv_bias": True, "vec_in_dim": 768, "guidance_embed": True, "byt5": False,
           "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}  # fmt: skip
UNET = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
        "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1, "context_dim": 768,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]}  # fmt: skip
WAN = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 2, "in_dim": 16, "out_dim": 16}
COSMOS = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
          "patch_spatial": 2, "patch_temporal": 1, "model_channels": 4096, "num_blocks": 2, "num_heads": 32,
          "pos_emb_cls": "rope3d", "block_x_format": "THWBD", "affline_emb_norm": True, "use_adaln_lora": True,
          "adaln_lora_dim": 256, "extra_per_block_abs_pos_emb": True,
          "extra_per_block_abs_pos_emb_type": "learnable"}  # fmt: skip
PREDICT2 = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
            "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048, "num_blocks": 2, "num_heads": 16,
            "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "pos_emb_learnable": True,
            "use_adaln_lora": True, "adaln_lora_dim": 256}  # fmt: skip
LUMINA = {"patch_size": 2, "in_channels": 16, "dim": 2304, "n_layers": 2, "n_heads": 24, "n_kv_heads": 8,
          "cap_feat_dim": 2304, "qk_norm": True, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512]}  # fmt: skip
Z_IMAGE = {"patch_size": 2, "in_channels": 16, "dim": 3840, "n_layers": 2, "n_heads": 30, "n_kv_heads": 30,
           "cap_feat_dim": 2560, "qk_norm": True, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
           "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "pad_tokens_multiple": 32}  # fmt: skip
HIDREAM = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "num_single_layers": 2,
           "axes_dims_rope": [64, 32, 32], "caption_channels": [4096, 4096], "max_resolution": [128, 128],
           "llama_layers": [0, 1, 2, 3]}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One real architecture: ComfyUI's class and arguments, and the family that must recognise it."""

    name: str
    family: str
    where: str  # "module:Class" below comfy
    config: dict = field(default_factory=dict)
    prefix: str = ""
    text: bool = False
    device: str = "meta"

    def module(self) -> torch.nn.Module:
        """ComfyUI's module, without memory where its constructor allows that.

        Raises:
            ImportError, AttributeError: this ComfyUI does not have the architecture.
        """
        import comfy.ops

        module, _, name = self.where.partition(":")
        cls = getattr(importlib.import_module(f"comfy.{module}"), name)
        common = {
            "dtype": torch.bfloat16,
            "device": self.device,
            "operations": comfy.ops.disable_weight_init,
        }
        with torch.device(self.device):
            return cls(self.config, **common) if self.text else cls(**self.config, **common)

    def shapes(self, module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        """Key -> shape, as files for ComfyUI have them."""
        return {self.prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}

    def linears(self, module: torch.nn.Module) -> set[str]:
        """Names of the layers that ComfyUI can load quantized: its Linear modules."""
        return {
            self.prefix + name
            for name, part in module.named_modules()
            if isinstance(part, torch.nn.Linear)
        }


def text(name: str, family: str, where: str, prefix: str = "", **config: object) -> Model:
    return Model(name, family, where, config, prefix, text=True)


T5 = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True,
      "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "relative_attention_num_buckets": 32}  # fmt: skip
CLIP = {"num_hidden_layers": 2, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "quick_gelu", "eos_token_id": 2, "projection_dim": 768, "max_position_embeddings": 77,
        "vocab_size": 49408}  # fmt: skip
LLM = {"num_hidden_layers": 2}

DIFFUSION = [
    Model("Flux.1 dev", "flux", "ldm.flux.model:Flux", {**FLUX, "vec_in_dim": 768, "guidance_embed": True}),
    Model("Flux.1 schnell", "flux", "ldm.flux.model:Flux", {**FLUX, "vec_in_dim": 768, "guidance_embed": False}),
    Model("Flux.2 dev", "flux2", "ldm.flux.model:Flux", {
        **FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "hidden_size": 6144,
        "context_in_dim": 15360, "num_heads": 48, "axes_dim": [32, 32, 32, 32], "theta": 2000, "mlp_ratio": 3.0,
        "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "vec_in_dim": None,
        "guidance_embed": True, "txt_ids_dims": [3]}),
    Model("SD3.5 large", "sd3", "ldm.modules.diffusionmodules.mmdit:OpenAISignatureMMDITWrapper", {
        "input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 38, "num_blocks": 2,
        "adm_in_channels": 2048, "qk_norm": "rms", "num_patches": 36864, "pos_embed_max_size": 192,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}}}),
    Model("SDXL", "sdxl", "ldm.modules.diffusionmodules.openaimodel:UNetModel", {
        **UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "context_dim": 2048, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
        "num_heads": -1, "num_head_channels": 64}, prefix="model.diffusion_model."),
    Model("SD 1.5", "sd15", "ldm.modules.diffusionmodules.openaimodel:UNetModel", UNET, prefix="model.diffusion_model."),
    Model("Qwen-Image", "qwen_image", "ldm.qwen_image.model:QwenImageTransformer2DModel", {"num_layers": 2}),
    Model("Wan 2.1 t2v 14B", "wan", "ldm.wan.model:WanModel", {**WAN, "model_type": "t2v"}),
    Model("Wan 2.1 i2v 14B", "wan", "ldm.wan.model:WanModel", {**WAN, "model_type": "i2v", "in_dim": 36}),
    Model("Wan 2.1 VACE", "wan", "ldm.wan.model:VaceWanModel", {
        **WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96}),
    Model("Wan 2.2 S2V", "wan", "ldm.wan.model:WanModel_S2V", {**WAN, "model_type": "s2v"}),
    Model("Wan 2.2 Animate", "wan", "ldm.wan.model_animate:AnimateWanModel", {**WAN, "model_type": "animate", "in_dim": 36}),
    Model("Wan Animate with face adapter", "wan", "ldm.wan.model_animate:AnimateWanModel", {
        **WAN, "model_type": "animate", "in_dim": 36, "num_layers": 10}),
    Model("Wan HuMo", "wan", "ldm.wan.model:HumoWanModel", {**WAN, "model_type": "humo", "in_dim": 36}),
    Model("Wan Camera", "wan", "ldm.wan.model:CameraWanModel", {**WAN, "model_type": "camera", "in_dim": 32}),
    Model("HunyuanVideo", "hunyuan_video", "ldm.hunyuan_video.model:HunyuanVideo", HUNYUAN),
    Model("HunyuanImage 2.1 distilled", "hunyuan_video", "ldm.hunyuan_video.model:HunyuanVideo", {
        **HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "context_in_dim": 3584,
        "axes_dim": [64, 64], "vec_in_dim": None, "byt5": True, "meanflow": True}),
    Model("HunyuanVideo 1.5", "hunyuan_video", "ldm.hunyuan_video.model:HunyuanVideo", {
        **HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "hidden_size": 2048, "num_heads": 16,
        "context_in_dim": 3584, "depth_single_blocks": 0, "vec_in_dim": None, "guidance_embed": False, "byt5": True,
        "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True}),
    Model("Z-Image", "z_image", "ldm.lumina.model:NextDiT", Z_IMAGE),
    Model("Z-Image Omni", "z_image", "ldm.lumina.model:NextDiT", {**Z_IMAGE, "siglip_feat_dim": 1152}),
    Model("NewBie", "lumina2", "ldm.lumina.model:NextDiT", {**LUMINA, "cap_feat_dim": 2560, "clip_text_dim": 1024}),
    Model("Lumina 2", "lumina2", "ldm.lumina.model:NextDiT", LUMINA),
    Model("Chroma", "chroma", "ldm.chroma.model:Chroma", CHROMA),
    Model("Chroma Radiance", "radiance", "ldm.chroma_radiance.model:ChromaRadiance", {
        **CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64, "nerf_mlp_ratio": 4,
        "nerf_depth": 4, "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
        "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False}),
    Model("LTX-Video", "ltxv", "ldm.lightricks.model:LTXVModel", {"num_layers": 2}),
    Model("LTX-2", "ltxv", "ldm.lightricks.av_model:LTXAVModel", {"num_layers": 2, "cross_attention_dim": 4096}),
    Model("LTX-2.3", "ltxv", "ldm.lightricks.av_model:LTXAVModel", {
        "num_layers": 2, "cross_attention_dim": 4096, "apply_gated_attention": True}),
    Model("PixArt Sigma", "pixart", "ldm.pixart.pixartms:PixArtMS", {
        "input_size": 128, "depth": 2, "model_max_length": 300, "micro_condition": False, "pe_interpolation": 2}, device="cpu"),
    Model("PixArt Alpha", "pixart", "ldm.pixart.pixartms:PixArtMS", {
        "input_size": 128, "depth": 2, "model_max_length": 120, "micro_condition": True, "pe_interpolation": 2}, device="cpu"),
    Model("AuraFlow", "auraflow", "ldm.aura.mmdit:MMDiT", {"n_layers": 4, "n_double_layers": 2}),
    Model("HiDream", "hidream", "ldm.hidream.model:HiDreamImageTransformer2DModel", HIDREAM),
    Model("Cosmos 7B", "cosmos", "ldm.cosmos.model:GeneralDIT", COSMOS, prefix="net."),
    Model("Cosmos-Predict2", "cosmos_predict2", "ldm.cosmos.predict2:MiniTrainDIT", PREDICT2, prefix="net."),
    Model("Anima", "anima", "ldm.anima.model:Anima", PREDICT2, prefix="net."),
]  # fmt: skip
TEXT = [
    text("T5-XXL", "t5", "text_encoders.t5:T5", model_type="t5", **T5),
    text(
        "UMT5-XXL", "umt5", "text_encoders.t5:T5", model_type="umt5", **{**T5, "vocab_size": 256384}
    ),
    text("CLIP-L", "clip", "clip_model:CLIPTextModel", **CLIP),
    text("Qwen2.5-VL 7B", "qwen2_text", "text_encoders.llama:Qwen25_7BVLI", **LLM),
    text("Qwen3 4B", "qwen3_text", "text_encoders.llama:Qwen3_4B", **LLM),
    text("Gemma 2 2B", "gemma", "text_encoders.llama:Gemma2_2B", **LLM),
    text("Gemma 3 4B", "gemma", "text_encoders.llama:Gemma3_4B", **LLM),
    text("Gemma 3 4B vision", "gemma", "text_encoders.llama:Gemma3_4B_Vision", **LLM),
    text("Gemma 3 12B", "gemma", "text_encoders.llama:Gemma3_12B", **LLM),
    text("Mistral 3 24B", "mistral", "text_encoders.llama:Mistral3Small24B", **LLM),
]
MODELS = [*DIFFUSION, *TEXT]

# The whole depth of models that people have. Wan 2.2 14B is two files of the size of Wan 2.1's.
DEPTHS = {
    "Flux.1 dev": {"depth": 19, "depth_single_blocks": 38},
    "Qwen-Image": {"num_layers": 60},
    "Wan 2.1 t2v 14B": {"num_layers": 40},
    "Z-Image": {"n_layers": 30},
    "SDXL": {},
}


@cache
def whole_header(name: str) -> Header:
    """Names and shapes of a real model at full depth, in bf16."""
    model = next(known for known in DIFFUSION if known.name == name)
    whole = replace(model, config={**model.config, **DEPTHS[name]})
    shapes = whole.shapes(whole.module())
    return Header({key: TensorSpec(key, "BF16", shape) for key, shape in shapes.items()})


def import_comfy(tree: object) -> None:
    """Make ComfyUI's package importable in this process, on the CPU."""
    if str(tree) not in sys.path:
        sys.path.insert(0, str(tree))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # read when comfy.model_management is imported
