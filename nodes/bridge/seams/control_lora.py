"""Seam `control_lora`: a Control-LoRA takes the decoded weights of a quantized model.

Wraps: `comfy.controlnet.ControlLora.pre_run`; while it runs, the diffusion model lists decoded
    weights.
Why: a Control-LoRA is a low-rank difference to the model that is sampled; ComfyUI copies that
    model's stored tensors into a ControlNet of plain layers, codes included.
Since: every ComfyUI that FewBits supports (0.18).
Without it: codes are taken for weights, of ComfyUI's own formats too, and the control is noise
    without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import comfy.controlnet
import comfy.model_base
import torch

from ..weights import is_side, quantized_layers
from .wrap import wrap


def install() -> None:
    wrap(comfy.controlnet.ControlLora, "pre_run", _with_decoded_weights)


def _with_decoded_weights(
    original: Callable,
    control: comfy.controlnet.ControlLora,
    model: comfy.model_base.BaseModel,
    *args: object,
    **kwargs: object,
) -> object:
    diffusion_model = model.diffusion_model
    quantized = quantized_layers(diffusion_model)
    if not quantized:
        return original(control, model, *args, **kwargs)
    listed = Decoded(diffusion_model.state_dict(), quantized)
    diffusion_model.state_dict = lambda *args, **kwargs: listed  # hides the method for this call
    try:
        return original(control, model, *args, **kwargs)
    finally:
        del diffusion_model.state_dict


class Decoded(Mapping):
    """The weights of a model under the names of its state dict; quantized ones are decoded when
    they are asked for, and their scales are left out.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], quantized: Mapping[str, torch.nn.Module]):
        self._state = {key: tensor for key, tensor in state.items() if not is_side(key, quantized)}
        self._quantized = quantized

    def __getitem__(self, key: str) -> torch.Tensor:
        base, _, name = key.rpartition(".")
        if name == "weight" and base in self._quantized:
            return self._quantized[base].weight.dequantize()
        return self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
