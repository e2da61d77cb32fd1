"""Seam `low_rank`: a LoRA on a quantized layer runs beside its product: y + up(down(x)).

Wraps: `ModelPatcher.load` and `ModelPatcherDynamic.load`, which are not shown the patches that run
    beside; `partially_unload` and `unpatch_model`; `model_state_dict_for_saving`, which rounds
    them into what is saved; and `comfy.ops.linear_input_act`, which multiplies by an INT8 weight
    without calling its layer.
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

import comfy.ops
import torch
from comfy import model_patcher
from comfy_kitchen.tensor import QuantizedTensor

from .layers import OwnLinear
from .wrap import wrap

SETTING = "FEWBITS_LORA"  # `bake`: rounded into the weights, as ComfyUI does it
SAVING = "model_state_dict_for_saving"
FUSED = "linear_input_act"  # since 0.30, for the layers after an activation: Wan, LTX, MiniMax


def install() -> None:
    if not hasattr(model_patcher.ModelPatcher, SAVING):
        return  # a saved model would lack its LoRA
    for name in ("ModelPatcher", "ModelPatcherDynamic"):
        wrap(getattr(model_patcher, name), "load", _load)
    wrap(model_patcher.ModelPatcher, "partially_unload", _partially_unload)
    wrap(model_patcher.ModelPatcher, "unpatch_model", _unpatch_model)
    wrap(model_patcher.ModelPatcher, SAVING, _for_saving)
    if hasattr(comfy.ops, FUSED):
        wrap(comfy.ops, FUSED, _called)


class Called:
    """A layer as `linear_input_act` takes one that it has to call."""

    weight = None
    _full_precision_mm = True

    def __init__(self, layer: torch.nn.Module):
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._layer(x)


def _called(
    original: Callable, layer: torch.nn.Module, *args: object, **kwargs: object
) -> torch.Tensor:
    """A layer with something beside it is called; so is one whose input may not be rounded, which
    ComfyUI up to 0.33 does not ask here.
    """
    beside = getattr(layer, "_fewbits_low_rank", None) is not None
    if beside or getattr(layer, "_full_precision_mm", False):
        layer = Called(layer)
    return original(layer, *args, **kwargs)


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


def _matrices(patch: tuple) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """(up, down, scale) of one of ComfyUI's patches; None where it is no LoRA of two matrices."""
    strength, adapter, strength_model, _, function = patch
    parts = getattr(adapter, "weights", None)
    if getattr(adapter, "name", None) != "lora" or not isinstance(parts, tuple) or len(parts) != 6:
        return None
    up, down, alpha, *others = parts  # a middle matrix, magnitudes, another shape
    if any(part is not None for part in (*others, function)) or strength_model != 1.0:
        return None
    up, down = up.flatten(1), down.flatten(1)
    return up, down, strength if alpha is None else strength * alpha / down.shape[0]


def _part(patch: tuple, shape: torch.Size) -> tuple[slice, slice] | None:
    """Rows and columns of the weight that a patch changes; None where it goes ComfyUI's way."""
    matrices, offset = _matrices(patch), patch[3]
    if matrices is None:
        return None
    part = [slice(0, size) for size in shape]
    if offset is not None:
        axis, first, size = offset
        if axis not in (0, 1):
            return None
        part[axis] = slice(first, first + size)
    up, down, _ = matrices
    height, width = (piece.stop - piece.start for piece in part)
    fits = (up.shape[0], down.shape[1]) == (height, width) and up.shape[1] == down.shape[0]
    inside = all(piece.stop <= size for piece, size in zip(part, shape, strict=True))
    if fits and inside:
        return tuple(part)
    return None


def _low_rank(
    patches: list[tuple], shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> LowRank | None:
    """All patches of a layer together; None where none does anything."""
    active = [patch for patch in patches if patch[0] != 0]
    ranks = [len(_matrices(patch)[1]) for patch in active]
    if not ranks:
        return None
    n, k = shape
    down = torch.zeros(sum(ranks), k, device=device, dtype=dtype)
    up = torch.zeros(n, sum(ranks), device=device, dtype=dtype)
    first = 0
    for patch, rank in zip(active, ranks, strict=True):
        factor, inner, scale = _matrices(patch)
        rows, columns = _part(patch, shape)
        here = slice(first, first + rank)
        down[here, columns] = inner.to(device, dtype)
        up[rows, here] = (scale * factor.to(device, torch.float32)).to(dtype)
        first += rank
    return LowRank(down, up)


def _quantized(patcher: model_patcher.ModelPatcher) -> Iterator[tuple[str, OwnLinear]]:
    for name, layer in patcher.model.named_modules():
        if isinstance(layer, OwnLinear):
            yield f"{name}.weight", layer


def _beside(patcher: model_patcher.ModelPatcher) -> set[str]:
    """Keys of the weights whose patches run beside."""
    if os.environ.get(SETTING) == "bake" or not patcher.patches:
        return set()
    return {
        key
        for key, layer in _quantized(patcher)
        if isinstance(layer.weight, QuantizedTensor)
        and key not in patcher.weight_wrapper_patches
        and _all_fit(patcher.patches.get(key), layer.weight.shape)
    }


def _all_fit(patches: list[tuple] | None, shape: torch.Size) -> bool:
    return bool(patches) and all(_part(patch, shape) is not None for patch in patches)


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
    beside = set() if force_patch_weights else _beside(patcher)
    with _without(patcher, beside):
        result = original(
            patcher, device_to, lowvram_model_memory, force_patch_weights, *args, **kwargs
        )
    for key, layer in _quantized(patcher):
        layer._fewbits_low_rank = None
        if key in beside:
            weight, dtype = layer.weight, layer.factory_kwargs["dtype"]
            layer._fewbits_low_rank = _low_rank(
                patcher.patches[key], weight.shape, device_to or weight.device, dtype
            )
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
