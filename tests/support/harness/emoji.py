"""The emoji model: its files, its prompts and its workflow."""

from __future__ import annotations

import copy
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACK = ROOT  # the pack itself; the server places it as custom_nodes/ComfyUI-FewBits
EMOJI = ROOT / "tests" / "assets" / "emoji"
EMOJI_NODES = EMOJI / "comfy_nodes"
PROMPTS = (EMOJI / "prompts.txt").read_text(encoding="utf-8").split("\n")[:8]
# What every run draws; all of PROMPTS only what measures the tables of docs/ does.
CHECKED = PROMPTS[:1]
ORIGINAL = "emoji_flux.safetensors"
_WORKFLOW = json.loads((EMOJI / "workflow_api.json").read_text(encoding="utf-8"))


def emoji_models(*diffusion_models: Path) -> dict[str, list[Path]]:
    """Model folders for the server: the original, its VAE and LoRA, and any further diffusion models."""
    return {
        "diffusion_models": [EMOJI / "emoji_flux.safetensors", *diffusion_models],
        "vae": [EMOJI / "emoji_vae.safetensors"],
        "loras": [EMOJI / "emoji_lora_blue.safetensors"],
    }


def emoji_workflow(
    model: str = "emoji_flux.safetensors",
    prompt: str = "panda",
    *,
    seed: int = 1,
    steps: int = 16,
    lora: float = 0.0,
) -> dict:
    """The API workflow: node 1 UNETLoader, 3 LoRA, 4 prompt, 7 KSampler, 8 VAEDecode, 9 SaveImage.

    To sample another MODEL, point `workflow["7"]["inputs"]["model"]` at it.
    """
    workflow = copy.deepcopy(_WORKFLOW)
    workflow["1"]["inputs"]["unet_name"] = model
    workflow["3"]["inputs"]["strength_model"] = lora
    workflow["4"]["inputs"]["text"] = prompt
    workflow["7"]["inputs"] |= {"seed": seed, "steps": steps}
    return workflow
