"""Layers that ComfyUI reads and nothing here writes (checkpoint/host_layers.py).

They are copied as they are, and decoded where a float weight is asked for.

| stored | decoded |
|---|---|
| `awq_w4a16`: I8 (N, K/2), `weight_scale`, `weight_zeros` (K/G, N) | (code - 8) * scale + zero |
| bank of experts, 3-D or flat | (E, N, K), which ComfyUI reads as such |
| `asym_w4a8_int8` in groups of any size | as importers/asym_w4a8.py says |
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ....kernels.packing import unpack_nibbles
from ...errors import CheckpointError, RecipeError
from ...formats import FORMATS, FormatOptions, get_format
from ...sources import TORCH_DTYPES, spec_of
from ...spec import TensorSpec
from ..host_layers import ASYM, group_size, host_layer, is_bank
from .asym_w4a8 import decode_asym
from .base import ImportOptions, StoredLayer, Tensors, Translation

AWQ_ZERO = 8  # the code of a weight that equals its group's zero point


class ComfyuiLayers:
    def claims(self, layer: StoredLayer) -> bool:
        return host_layer(layer.said, layer.specs) is not None

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation | None:
        name = layer.said["format"]
        known = is_bank(layer.said) or name in options.host_formats or not options.host_formats
        shape, decode = _decoder(layer, name)
        if options.foreign_only and known and not layer.misspelled:
            return None
        if options.foreign_only and not known:  # an older ComfyUI: float weights open in any
            made = self._copied(layer, shape, decode)
            return made.decoded(made.float_dtype, f"{name} is unknown to this ComfyUI: decoded")
        return self._copied(layer, shape, decode)

    def _copied(
        self,
        layer: StoredLayer,
        shape: tuple[int, ...],
        decode: Callable[[Tensors], torch.Tensor],
    ) -> Translation:
        specs = {suffix: spec for suffix, spec in layer.specs.items() if suffix != "comfy_quant"}
        both = layer.header_marker is not None and layer.tensor_marker is not None
        return Translation(
            dialect="comfyui",
            outputs={suffix: (spec.dtype, spec.shape) for suffix, spec in specs.items()},
            convert=lambda tensors: {suffix: tensors[suffix] for suffix in specs},
            note="" if both and not layer.misspelled else "JSON completed",
            marker={**layer.marker, "format": layer.said["format"]},
            float_dtype=layer.orig_dtype,
            stock=not layer.misspelled,
            decode=decode,
            shape=shape,
        )


def _decoder(
    layer: StoredLayer, name: str
) -> tuple[tuple[int, ...], Callable[[Tensors], torch.Tensor]]:
    """(logical shape, stored tensors -> float32 of it)."""
    if is_bank(layer.said):
        return _bank(layer, name)
    if name == ASYM:
        return decode_asym(layer)
    n, half = layer.matrix
    size = group_size(layer.said)
    return (n, 2 * half), lambda tensors: decode_awq(tensors, size)


def decode_awq(tensors: Tensors, size: int) -> torch.Tensor:
    """awq_w4a16 -> (N, K) float32: (code - 8) * scale + zero, each result rounded.

    Args:
        tensors: `weight` (N, K/2) int8, even column in the low nibble; `weight_scale` and
            `weight_zeros` (K/size, N) of any float dtype.

    Raises:
        CheckpointError: a tensor is missing, or their shapes do not fit the group size.
    """
    missing = [name for name in ("weight_scale", "weight_zeros") if name not in tensors]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing; awq_w4a16 needs it")
    codes = unpack_nibbles(tensors["weight"].view(torch.uint8), high_first=False)
    n, k = codes.shape
    scale, zeros = (tensors[name].float() for name in ("weight_scale", "weight_zeros"))
    if not size or k % size or {tuple(scale.shape), tuple(zeros.shape)} != {(k // size, n)}:
        raise CheckpointError(
            f"weight_scale is {list(scale.shape)} and weight_zeros {list(zeros.shape)}; awq_w4a16 "
            f"of {n}x{k} in groups of {size} has ({k // size if size else 'K/G'}, {n})"
        )
    wide = (codes.float() - AWQ_ZERO).view(n, k // size, size)
    return wide.mul_(scale.t()[:, :, None]).add_(zeros.t()[:, :, None]).view(n, k)


def _bank(
    layer: StoredLayer, name: str
) -> tuple[tuple[int, ...], Callable[[Tensors], torch.Tensor]]:
    """A bank, every expert decoded by its format's own decoder."""
    experts = layer.said["num_experts"]
    stored = layer.weight.shape
    flat = len(stored) == 2
    if type(experts) is not int or experts < 1 or stored[0] % experts or len(stored) not in (2, 3):
        raise CheckpointError(f"bank of {experts!r} experts: its weight is {list(stored)}")
    if not flat and stored[0] != experts:
        raise CheckpointError(f"bank of {experts} experts: its weight is {list(stored)}")
    rows = stored[0] // experts if flat else stored[1]
    columns = stored[-1] * (FORMATS[name].codes_per_byte if name in FORMATS else 2)
    marker = {key: value for key, value in layer.said.items() if key != "num_experts"}
    if name in FORMATS:
        outline = {
            suffix: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device="meta")
            for suffix, spec in layer.specs.items()
        }
        _options(name, marker, _expert(outline, 0, experts, flat))

    def decode(tensors: Tensors) -> torch.Tensor:
        pieces = [
            _decode_expert(name, marker, _expert(tensors, expert, experts, flat))
            for expert in range(experts)
        ]
        return torch.stack(pieces)[:, :rows, :columns]

    return (experts, rows, columns), decode


def _expert(tensors: Tensors, expert: int, experts: int, flat: bool) -> Tensors:
    """One expert's tensors: its rows of everything that has rows, the rest as it is."""
    out = {}
    for suffix, tensor in tensors.items():
        shared = tensor.dim() == 0 or suffix in ("weight_codebook", "comfy_quant")
        if shared or tensor.shape[0] % experts:
            out[suffix] = tensor
        elif flat:
            out[suffix] = tensor.chunk(experts)[expert]
        else:
            out[suffix] = tensor[expert]
    return out


def _decode_expert(name: str, marker: dict, tensors: Tensors) -> torch.Tensor:
    if name not in FORMATS:
        return decode_awq(tensors, group_size(marker))
    format = get_format(name)
    specs, options = _options(name, marker, tensors)
    return format.dequantize(tensors, format.stored_layer(marker, specs), options)


def _options(
    name: str, marker: dict, tensors: Tensors
) -> tuple[dict[str, TensorSpec], FormatOptions]:
    """The tensors and options of one expert.

    Raises:
        CheckpointError: they are not those of the format.
    """
    specs = {suffix: spec_of(suffix, tensor) for suffix, tensor in tensors.items()}
    try:
        return specs, get_format(name).options_from(marker, specs)
    except (CheckpointError, RecipeError) as error:
        raise CheckpointError(f"bank of experts in {name}: {error}") from None
