"""Seam 4: ComfyUI recognises models by weight shapes; packed layers show it the shapes they had
before packing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import comfy.model_detection
import torch

from ...quant_ops.checkpoint.metadata import parse_marker
from ...quant_ops.errors import CheckpointError
from ...quant_ops.formats import get_format
from ...quant_ops.sources import spec_of

MARK = "_fewbits_wrapped"


def install(owned: set[str]) -> None:
    """Wrap `comfy.model_detection.detect_unet_config`; only that function sees the logical shapes.

    Args:
        owned: formats that this ComfyUI does not read itself.
    """
    original = comfy.model_detection.detect_unet_config
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def detect_unet_config(state_dict: dict, *args: object, **kwargs: object):
        stand_ins = logical_weights(state_dict, owned)
        return original(
            LogicalShapes(state_dict, stand_ins) if stand_ins else state_dict, *args, **kwargs
        )

    setattr(detect_unet_config, MARK, True)
    comfy.model_detection.detect_unet_config = detect_unet_config


def logical_weights(state_dict: Mapping, owned: set[str]) -> dict[str, torch.Tensor]:
    """key -> stand-in without data for every weight whose stored shape is not its logical one."""
    stand_ins = {}
    for name in state_dict:
        base, _, suffix = name.rpartition(".")
        key = f"{base}.weight"
        if suffix != "comfy_quant" or key not in state_dict or state_dict[name].is_meta:
            continue  # without data (a header sent through detection) there is nothing to read
        try:
            marker = parse_marker(base, bytes(state_dict[name].cpu().tolist()))
            if marker.get("format") not in owned:
                continue
            stored = {"weight": spec_of("weight", state_dict[key])}
            shape = get_format(marker["format"]).stored_layer(marker, stored).shape
        except CheckpointError:
            continue  # the loader says it, with the layer's name
        if shape != tuple(state_dict[key].shape):
            stand_ins[key] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return stand_ins


class LogicalShapes(Mapping):
    """A state dict to look at, some of its weights replaced by stand-ins."""

    def __init__(self, state_dict: Mapping, stand_ins: dict[str, torch.Tensor]):
        self._state_dict, self._stand_ins = state_dict, stand_ins

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._stand_ins[key] if key in self._stand_ins else self._state_dict[key]

    def __contains__(self, key: object) -> bool:
        return key in self._state_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self._state_dict)

    def __len__(self) -> int:
        return len(self._state_dict)
