"""Seam `detection`: packed layers show ComfyUI the shapes that they had before packing.

Wraps: `comfy.model_detection.detect_unet_config`; only that function sees the logical shapes.
Why: ComfyUI recognises a diffusion model, and reads its widths, off the shapes of weights; a 4-bit
    weight of (N, K) lies in the file as (N, K / 2).
Since: ComfyUI 0.8.
Without it: a file whose first or last projection is packed is not recognised, or is built half as
    wide and fails while sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

import comfy.model_detection
import torch

from ....quant_ops.checkpoint.metadata import parse_marker
from ....quant_ops.checkpoint.reader import tensor_text
from ....quant_ops.errors import CheckpointError
from ....quant_ops.formats import FORMATS, get_format
from ....quant_ops.sources import spec_of
from .wrap import wrap


def install() -> None:
    wrap(comfy.model_detection, "detect_unet_config", _with_logical_shapes)


def _with_logical_shapes(original: Callable, state_dict: dict, *args: object, **kwargs: object):
    stand_ins = logical_weights(state_dict)
    if stand_ins:
        state_dict = LogicalShapes(state_dict, stand_ins)
    return original(state_dict, *args, **kwargs)


def logical_weights(state_dict: Mapping) -> dict[str, torch.Tensor]:
    """key -> stand-in without data for every weight whose stored shape is not its logical one.

    In ComfyUI's own formats too: it loads a packed NVFP4 layer, but reads its packed width here.
    """
    stand_ins = {}
    for name in state_dict:
        base, _, suffix = name.rpartition(".")
        key = f"{base}.weight"
        if suffix != "comfy_quant" or key not in state_dict or state_dict[name].is_meta:
            continue  # without data (a header sent through detection) there is nothing to read
        try:
            marker = parse_marker(base, tensor_text(state_dict[name]))
            if marker.get("format") not in FORMATS or len(state_dict[key].shape) != 2:
                continue
            stored = {"weight": spec_of("weight", state_dict[key])}
            shape = get_format(marker["format"]).stored_layer(marker, stored).shape
        except CheckpointError:
            continue  # the loader says it, with the layer's name
        if shape != tuple(state_dict[key].shape):
            stand_ins[key] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return stand_ins


class LogicalShapes(MutableMapping):
    """A state dict to look at, some of its weights replaced by stand-ins. What is renamed in it is
    renamed in the state dict: the names of Kandinsky 6 are, while it is recognised.
    """

    def __init__(self, state_dict: MutableMapping, stand_ins: dict[str, torch.Tensor]):
        self._state_dict, self._stand_ins = state_dict, stand_ins
        # by the identity of a stand-in: itself and what it stands for, until that is put back
        self._taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        if key in self._stand_ins:
            return self._stand_ins[key]
        return self._state_dict[key]

    def __setitem__(self, key: str, tensor: torch.Tensor) -> None:
        if id(tensor) in self._taken:
            self._stand_ins[key] = tensor
            _, tensor = self._taken.pop(id(tensor))
        self._state_dict[key] = tensor

    def __delitem__(self, key: str) -> None:
        stored = self._state_dict.pop(key)
        stand_in = self._stand_ins.pop(key, None)
        if stand_in is not None:
            self._taken[id(stand_in)] = (stand_in, stored)

    def __contains__(self, key: object) -> bool:
        return key in self._state_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self._state_dict)

    def __len__(self) -> int:
        return len(self._state_dict)
