"""Layers to measure methods on: synthetic ones, and the emoji model's with the activations of its own sampling loop."""

from __future__ import annotations

import argparse
import importlib.util

import torch

from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.pipeline import plan_source
from fewbits.quant_ops.planning.recipe import Recipe, Wish
from support.helpers import EMOJI


def heavy_weight(n: int = 256, k: int = 320, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """(n, k) float32: one weight in a thousand is 4.5 times as large, and a tenth of the energy has rank 32.

    Its errors under nearest are those of the design's reference layer: fp8 .0265, int8 block 128 .022, nf4 .094.
    """
    here = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    weight = torch.randn(n, k, **here)
    weight = torch.where(torch.rand(n, k, **here) < 1e-3, weight * 4.5, weight)
    low_rank = torch.randn(n, 32, **here) @ torch.randn(32, k, **here) / 32**0.5
    return (weight + 0.3 * low_rank) * 0.02


def correlated_rows(
    k: int, rows: int = 2048, seed: int = 1, device: str = "cpu", kind: str = "falling"
) -> torch.Tensor:
    """(rows, k) float32 activations, normal, of one of the KINDS of correlation."""
    here = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    return KINDS[kind](k, rows, here)


def _falling(k: int, rows: int, here: dict) -> torch.Tensor:
    """Strength falls from 1 to e^-3 over random directions."""
    strength = torch.linspace(0, 3, k, device=here["device"]).neg().exp()[:, None]
    mix = torch.randn(k, k, **here) * strength
    return torch.randn(rows, k, **here) @ mix / k**0.5


def _factors(k: int, rows: int, here: dict) -> torch.Tensor:
    """k / 48 directions that all channels share, and a noise of half their strength."""
    shared = max(k // 48, 1)
    mix = torch.randn(shared, k, **here) / shared**0.5
    return torch.randn(rows, shared, **here) @ mix + 0.5 * torch.randn(rows, k, **here)


def _power(k: int, rows: int, here: dict) -> torch.Tensor:
    """The i-th of k random directions has a variance of i^-1.1."""
    strength = torch.arange(1, k + 1, device=here["device"]).pow(-0.55)[:, None]
    return torch.randn(rows, k, **here) @ (torch.randn(k, k, **here) * strength)


def _neighbours(k: int, rows: int, here: dict) -> torch.Tensor:
    """Each channel correlates .92 with the one before it."""
    near = torch.randn(rows, k, **here)
    place = torch.arange(k, device=here["device"])
    apart = (place[None] - place[:, None]).float()
    mix = torch.where(apart < 0, 0.0, 0.92**apart)
    mix[1:] *= (1 - 0.92**2) ** 0.5
    return near @ mix


KINDS = {"factors": _factors, "power": _power, "neighbours": _neighbours, "falling": _falling}


def emoji_trainer(device: str = "cpu"):
    """(train.py as a module, the emoji model as it was trained, all prompts)."""
    spec = importlib.util.spec_from_file_location("emoji_train", EMOJI.parent / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    place = argparse.Namespace(out=str(EMOJI.parent), work=str(EMOJI.parent))
    prompts = (EMOJI.parent / "prompts.txt").read_text(encoding="utf-8").split("\n")
    return train, train.load_flux(place, device), prompts


def emoji_activations(rows: int = 4096) -> dict[str, torch.Tensor]:
    """Inputs of every linear layer while the emoji model draws four pictures, `rows` of each at most."""
    train, model, prompts = emoji_trainer()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            keep = seen.setdefault(name, [])
            module.register_forward_pre_hook(
                lambda _, inputs, keep=keep: keep.append(inputs[0].flatten(0, -2))
            )
    train.sample(model, *train.conditioning(prompts[:4], "cpu"), 8, 3.0, 1, "cpu")
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.cat(parts) for name, parts in seen.items() if parts}
    return {
        name: x[torch.randperm(len(x), generator=generator)[:rows]] for name, x in inputs.items()
    }


def emoji_weights(wish: Wish) -> dict[str, torch.Tensor]:
    """The weights that a plan with this wish quantizes."""
    with FileSource(EMOJI) as source:
        layers = plan_source(source, Recipe(wish)).layers
        return {
            layer.name: source.read(f"{layer.name}.weight")
            for layer in layers
            if layer.format == wish.format
        }
