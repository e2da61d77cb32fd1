"""Seam `low_rank`: a LoRA on a quantized layer runs beside its product: y + up(down(x)).

Wraps: `ModelPatcher.load` and `ModelPatcherDynamic.load`, which are not shown the patches that run
    beside; `partially_unload` and `unpatch_model`; and `model_state_dict_for_saving`, which rounds
    them into what is saved.
Why: ComfyUI decodes a quantized weight, adds the LoRA and rounds the sum: seconds of loading and a
    second rounding, or that work at each call where memory is short. Beside the product a LoRA is
    exact, takes no loading and changes no weight. Other patches than LoRA's, those of layers with
    wrapped weights, and all of them where FEWBITS_LORA is `bake`, go ComfyUI's way.
Since: ComfyUI 0.24, as far as tried; one without that last function, as 0.18, keeps its own way.
Without it: an NF4 layer with a LoRA has .098 of the exact result as its error, and loads slowly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from comfy import model_patcher
from comfy_kitchen.tensor import QuantizedTensor

from .layers import OwnLinear
from .wrap import wrap

SETTING = "FEWBITS_LORA"  # `bake`: rounded into the weights, as ComfyUI does it


SAVING = "model_state_dict_for_saving"


def install() -> None:
    if not hasattr(model_patcher.ModelPatcher, SAVING):
        return  # a saved model would lack its LoRA
    for name in ("ModelPatcher", "ModelPatcherDynamic"):
        wrap(getattr(model_patcher, name), "load", _load)
    wrap(model_patcher.ModelPatcher, "partially_unload", _partially_unload)
    wrap(model_patcher.ModelPatcher, "unpatch_model", _unpatch_model)
    wrap(model_patcher.ModelPatcher, SAVING, _for_saving)


class LowRank:
    """What patches add to a layer's output.

    Attributes:
        down, up: (R, K), (N, R), strength and alpha in `up`; R is the sum of the patches' ranks.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor):
        self.down, self.up = down, up

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` plus up(down(x)), in place where nothing records or traces."""
        down, up = self.down, self.up
        if down.dtype != x.dtype or down.device != x.device:
            down, up = down.to(x), up.to(x)
        inner = torch.nn.functional.linear(x, down)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return out + torch.nn.functional.linear(inner, up)
        n, rank = up.shape
        out.view(-1, n).addmm_(inner.view(-1, rank), up.t())
        return out


def _factors(patch: tuple, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(down, up) of one of ComfyUI's patches, of the whole weight's shape; None where it is no LoRA
    of two matrices.
    """
    strength, adapter, strength_model, offset, function = patch
    parts = getattr(adapter, "weights", None)
    if getattr(adapter, "name", None) != "lora" or not isinstance(parts, tuple) or len(parts) != 6:
        return None
    up, down, alpha, middle, magnitudes, reshaped = parts
    others = (middle, magnitudes, reshaped, function)
    if any(part is not None for part in others) or strength_model != 1.0:
        return None
    up, down = up.flatten(1).float(), down.flatten(1).float()
    scale = strength if alpha is None else strength * alpha / down.shape[0]
    rows, columns = (slice(size) for size in shape)
    if offset is not None:
        axis, first, size = offset
        if axis not in (0, 1):
            return None
        part = slice(first, first + size)
        rows, columns = (part, columns) if axis == 0 else (rows, part)
    whole_up = up.new_zeros(shape[0], up.shape[1])
    whole_down = down.new_zeros(down.shape[0], shape[1])
    if whole_up[rows].shape != up.shape or whole_down[:, columns].shape != down.shape:
        return None
    whole_up[rows], whole_down[:, columns] = scale * up, down
    return whole_down, whole_up


def _low_rank(layer: OwnLinear, patches: list[tuple]) -> LowRank | None:
    """All patches of a layer together; None where one of them is something else."""
    shape = layer.weight.shape
    active = [patch for patch in patches if patch[0] != 0 or patch[2] != 1.0]
    pairs = [_factors(patch, shape) for patch in active]
    if any(pair is None for pair in pairs):
        return None
    down = torch.cat([down for down, _ in pairs]) if pairs else torch.empty(0, shape[1])
    up = torch.cat([up for _, up in pairs], 1) if pairs else torch.empty(shape[0], 0)
    return LowRank(down, up)


def _quantized(patcher: model_patcher.ModelPatcher) -> Iterator[tuple[str, OwnLinear]]:
    for name, layer in patcher.model.named_modules():
        if isinstance(layer, OwnLinear):
            yield f"{name}.weight", layer


def _beside(patcher: model_patcher.ModelPatcher) -> dict[str, LowRank]:
    """What of a patcher's patches runs beside, by the weight's key."""
    if os.environ.get(SETTING) == "bake" or not patcher.patches:
        return {}
    found = {}
    for key, layer in _quantized(patcher):
        patches = patcher.patches.get(key)
        if not patches or not isinstance(layer.weight, QuantizedTensor):
            continue
        if key in patcher.weight_wrapper_patches:
            continue
        low_rank = _low_rank(layer, patches)
        if low_rank is not None:
            found[key] = low_rank
    return found


@contextlib.contextmanager
def _without(patcher: model_patcher.ModelPatcher, keys: object) -> Iterator[None]:
    """Inside, a patcher has no patches of these keys."""
    patches = patcher.patches
    patcher.patches = {key: value for key, value in patches.items() if key not in keys}
    try:
        yield
    finally:
        patcher.patches = patches


def _load(
    original: Callable,
    patcher: model_patcher.ModelPatcher,
    device_to: torch.device | None = None,
    lowvram_model_memory: int = 0,
    force_patch_weights: bool = False,
    *args: object,
    **kwargs: object,
) -> object:
    beside = {} if force_patch_weights else _beside(patcher)
    with _without(patcher, beside):
        result = original(
            patcher, device_to, lowvram_model_memory, force_patch_weights, *args, **kwargs
        )
    for key, layer in _quantized(patcher):
        low_rank = beside.get(key)
        if low_rank is not None:
            device, dtype = device_to or layer.weight.device, layer.factory_kwargs["dtype"]
            low_rank = LowRank(*(part.to(device, dtype) for part in (low_rank.down, low_rank.up)))
        layer._fewbits_low_rank = low_rank if low_rank is None or low_rank.down.numel() else None
    return result


def _partially_unload(
    original: Callable, patcher: model_patcher.ModelPatcher, *args: object, **kwargs: object
) -> object:
    beside = {key for key, layer in _quantized(patcher) if layer._fewbits_low_rank is not None}
    with _without(patcher, beside):
        return original(patcher, *args, **kwargs)


def _unpatch_model(
    original: Callable,
    patcher: model_patcher.ModelPatcher,
    device_to: torch.device | None = None,
    unpatch_weights: bool = True,
) -> object:
    result = original(patcher, device_to, unpatch_weights)
    if unpatch_weights:
        for _, layer in _quantized(patcher):
            layer._fewbits_low_rank = None
    return result


def _for_saving(
    original: Callable,
    patcher: model_patcher.ModelPatcher,
    model: torch.nn.Module | None = None,
    prefix: str = "",
) -> dict:
    """ComfyUI saves the weights of a loaded layer as they are; where patches run beside them, they
    are patched for the file. Its own way for layers that are not loaded refuses INT8.
    """
    saved = original(patcher, model, prefix)
    for key, layer in _quantized(patcher):
        if layer._fewbits_low_rank is not None:
            patched = patcher.patch_weight_to_device(
                key, device_to=patcher.load_device, return_weight=True
            )
            saved.update(_stored(layer, key.removeprefix(prefix), patched))
    return saved


def _stored(layer: OwnLinear, key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a layer of this weight saves, on the CPU."""
    before = layer.weight
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    try:
        state = layer.state_dict(prefix=key.removesuffix("weight"))
    finally:
        layer.weight = before
    return {name: tensor.to("cpu") for name, tensor in state.items()}
