"""The emoji model under the names that the templates have: what they ask for, small enough for a test."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from support import dialects
from support.helpers import clip_shapes, random_tensors

from .emoji import EMOJI, ORIGINAL
from .server import ComfyServer

MODEL = EMOJI / ORIGINAL
MODELS = (
    "flux1-dev",
    "qwen_image_bf16",
    "wan2.2_t2v_high_noise_14B_fp16",
    "wan2.2_t2v_low_noise_14B_fp16",
    "z_image_turbo_bf16",
)


def add_stand_ins(server: ComfyServer, folder: Path) -> None:
    """Also as a checkpoint and in old FP8; a text encoder is random."""
    for name in MODELS:
        server.add_model("diffusion_models", shutil.copyfile(MODEL, folder / f"{name}.safetensors"))
    tensors = load_file(MODEL)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(whole, folder / "sd_xl_base_1.0.safetensors")
    server.add_model("checkpoints", folder / "sd_xl_base_1.0.safetensors")
    legacy = dict(tensors)
    for name in tensors:
        base = name.removesuffix(".weight")
        if name.endswith(".weight") and tensors[name].ndim == 2 and "blocks." in name:
            legacy |= dialects.scaled_fp8(base, tensors[name].float())
    legacy["scaled_fp8"] = tensors[name].new_zeros(2).to(legacy[f"{base}.weight"].dtype)
    save_file(legacy, folder / "flux_dev_fp8_scaled.safetensors")
    server.add_model("diffusion_models", folder / "flux_dev_fp8_scaled.safetensors")
    save_file(random_tensors(clip_shapes()), folder / "clip_l.safetensors")
    server.add_model("text_encoders", folder / "clip_l.safetensors")
