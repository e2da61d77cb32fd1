"""How far the pictures and latents of a quantized model are from the original's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors.torch import load

from .emoji import PROMPTS, emoji_workflow
from .metrics import psnr, ssim
from .server import ComfyServer


@dataclass(frozen=True)
class Sample:
    """One prompt's picture (PIL) and final latent (float32)."""

    image: object
    latent: torch.Tensor


@dataclass(frozen=True)
class Quality:
    """Means over the prompts against the original on the same noise; `psnr` leaves out equal pictures."""

    ssim: float
    psnr: float | None
    latent_cosine: float


def sample(
    server: ComfyServer, model: str, prompts: Iterable[str] = PROMPTS, steps: int = 16
) -> dict[str, Sample]:
    """Prompt -> sample through the stock UNETLoader.

    Raises:
        RuntimeError: ComfyUI reported an error for a prompt; its message.
    """
    samples = {}
    for prompt in prompts:
        workflow = emoji_workflow(model, prompt, steps=steps)
        workflow["10"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": ["7", 0], "filename_prefix": "latents/emoji"},
        }
        run = server.run(workflow)
        if run.status != "success":
            raise RuntimeError(f"{model}: {prompt}: {run.error and run.error['exception_message']}")
        (latent,) = run.history["outputs"]["10"]["latents"]
        samples[prompt] = Sample(
            run.images()[0], load(server.view(latent))["latent_tensor"].float()
        )
    return samples


def compare(samples: dict[str, Sample], reference: dict[str, Sample]) -> Quality:
    pairs = [(found, reference[prompt]) for prompt, found in samples.items()]
    decibels = [psnr(found.image, wanted.image) for found, wanted in pairs]
    decibels = [value for value in decibels if value is not None]
    cosines = [
        torch.cosine_similarity(a.latent.flatten(), b.latent.flatten(), dim=0) for a, b in pairs
    ]
    return Quality(
        sum(ssim(found.image, wanted.image) for found, wanted in pairs) / len(pairs),
        sum(decibels) / len(decibels) if decibels else None,
        float(sum(cosines)) / len(pairs),
    )
