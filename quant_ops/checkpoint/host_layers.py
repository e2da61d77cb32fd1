"""Quantized layers that ComfyUI reads and nothing here writes: they are copied as they are.

| layer | why nothing here writes it |
|---|---|
| `awq_w4a16` | its codes come from calibration elsewhere |
| a bank of experts, 3-D or flat (E*N, K), with `num_experts` | models hold them quantized already |
| `asym_w4a8_int8` in other groups than 16, or without its codebook | ComfyUI takes any |
"""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import FORMATS
from ..formats.asym_w4a8 import AsymW4A8
from ..formats.base import stated_in
from ..spec import TensorSpec

# Formats of ComfyUI's own that have no class here -> the first ComfyUI that reads them. 0.33.0 does
# not have awq_w4a16, the sources of 0.38 do.
HOST_FORMATS = {"awq_w4a16": "0.38.0"}
BANKS_SINCE = "0.23.0"  # the first ComfyUI that reads quantized banks of experts
FLAT_BANKS_SINCE = "0.38.0"  # as (E*N, K); 0.33.0 knows (E, N, K) only
ASYM = AsymW4A8.name
ASYM_GROUP = 16  # the only one that is written here


@dataclass(frozen=True)
class HostLayer:
    """What such a layer is, in words, and the first ComfyUI that reads it."""

    what: str
    min_comfyui: str


def is_bank(marker: dict) -> bool:
    """Whether a quantized layer is a stack of experts as ComfyUI's MoEExperts stores it."""
    return "num_experts" in marker


def host_layer(marker: dict, specs: dict[str, TensorSpec]) -> HostLayer | None:
    """What a layer is that ComfyUI reads and nothing here writes; None for any other.

    Args:
        marker: its JSON.
        specs: its tensors by suffix.
    """
    name = marker.get("format")
    since = _since(name)
    if since is None:
        return None
    if is_bank(marker):
        flat = "weight" in specs and len(specs["weight"].shape) == 2
        banks = FLAT_BANKS_SINCE if flat else BANKS_SINCE
        return HostLayer("bank of experts", max(banks, since, key=_numbers))
    if name in HOST_FORMATS:
        return HostLayer("ComfyUI's own format", since)
    if name == ASYM and _asym_of_comfyui(marker, specs):
        return HostLayer("variant of another writer", since)
    return None


def _since(name: object) -> str | None:
    """The first ComfyUI that reads a format without FewBits; None where none does."""
    if name in HOST_FORMATS:
        return HOST_FORMATS[name]
    format = FORMATS.get(name) if isinstance(name, str) else None
    if format is not None and format.native:
        return format.min_comfyui
    return None


def _asym_of_comfyui(marker: dict, specs: dict[str, TensorSpec]) -> bool:
    """4-bit codes with e4m3fn group scales that are not exactly what is written here: groups of
    another size, or no codebook.
    """
    weight, relative = specs.get("weight"), specs.get("weight_s_rel")
    if weight is None or relative is None or "weight_s_channel" not in specs:
        return False
    if len(weight.shape) != 2 or len(relative.shape) != 2 or "weight_correction" in specs:
        return False
    size = group_size(marker)
    fits = relative.shape[1] * size == 2 * weight.shape[1]
    ours = size == ASYM_GROUP and "weight_codebook" in specs
    return fits and not ours and relative.dtype in ("F8_E4M3", "U8")


def group_size(marker: dict) -> int:
    """The group size that asym_w4a8_int8 and awq_w4a16 state in either place, as ComfyUI reads it;
    0 where it is no number.
    """
    default = ASYM_GROUP if marker.get("format") == ASYM else AWQ_GROUP
    size = stated_in(marker, "group_size", default)
    if type(size) is int and size > 0:
        return size
    return 0


AWQ_GROUP = 64


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
