"""Sample with a MODEL through ComfyUI, and keep what it predicted at each step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ...quant_ops.report.comparison import measure
from ...quant_ops.report.models import Model, Sample
from .weights import unload


@dataclass(frozen=True)
class Settings:
    """What all models share."""

    positive: list
    negative: list
    latent: dict
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    vae: object


def samplers() -> list[str]:
    return list(comfy.samplers.KSampler.SAMPLERS)


def schedulers() -> list[str]:
    return list(comfy.samplers.KSampler.SCHEDULERS)


def sampled(model: object, name: str, seeds: list[int], how: Settings) -> Model:
    """A MODEL's samples, one a seed, with the time of a step and the GPU's peak of memory.

    Raises:
        InterruptProcessingException: the user cancelled.
    """
    device = comfy.model_management.get_torch_device()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    samples = [_sample(model, seed, how) for seed in seeds]
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Model(name, samples, peak_bytes=peak)


def _sample(model: object, seed: int, how: Settings) -> Sample:
    latent = comfy.sample.fix_empty_latent_channels(model, how.latent["samples"])
    noise = comfy.sample.prepare_noise(latent, seed, how.latent.get("batch_index"))
    steps, times = [], []

    def keep(step: int, predicted: torch.Tensor, x: torch.Tensor, total: int) -> None:
        steps.append(predicted.detach().float().cpu())
        times.append(time.perf_counter())

    result = comfy.sample.sample(
        model,
        noise,
        how.steps,
        how.cfg,
        how.sampler,
        how.scheduler,
        how.positive,
        how.negative,
        latent,
        callback=keep,
        disable_pbar=True,
        seed=seed,
    )
    steps.append(result.detach().float().cpu())
    between = [after - before for before, after in zip(times, times[1:], strict=False)]
    return Sample(steps, _picture(how.vae, result), statistics.median(between) if between else 0.0)


def _picture(vae: object, latent: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) of the first picture; the first frame of a video."""
    decoded = vae.decode(latent).float().cpu()
    while decoded.dim() > 3:
        decoded = decoded[0]
    return decoded[..., :3].clamp(0, 1)


def layer_errors(reference: object, other: object) -> tuple[dict[str, float], dict[str, float]]:
    """rel_l2 of every linear weight of one MODEL against another's, both decoded, a layer at a
    time: with the LoRAs of each, and without any; layers that only one has, or in other shapes, are
    left out. MODELs may share one module: both are unloaded, so that it holds no LoRA of either.
    """
    for model in (reference, other):
        unload(model)
    theirs = dict(_linears(other))
    errors, unpatched = {}, {}
    for name, module in _linears(reference):
        match = theirs.get(name)
        if match is None:
            continue
        a, b = _decoded(module), _decoded(match)
        if a.shape == b.shape:
            unpatched[name] = _error(a, b)
        a, b = _patched(reference, name, a), _patched(other, name, b)
        if a.shape == b.shape:
            errors[name] = _error(a, b)
    return errors, unpatched


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    sums = measure(a, b)
    if sums.unlike:
        return math.inf
    return sums.rel_l2


def _patched(model: object, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A layer's float32 weight with the LoRAs of the MODEL."""
    key = f"diffusion_model.{name}.weight"
    patches = model.patches.get(key)
    if not patches:
        return weight
    return comfy.lora.calculate_weight(patches, weight.clone(), key)


def _linears(model: object) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules with a matrix; those of quantized layers are no torch.nn.Linear."""
    for name, module in model.model.diffusion_model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            yield name, module


def _decoded(module: torch.nn.Module) -> torch.Tensor:
    weight = module.weight
    if hasattr(weight, "dequantize") and type(weight.data) is not torch.Tensor:
        weight = weight.dequantize()
    return weight.detach().float().cpu()
