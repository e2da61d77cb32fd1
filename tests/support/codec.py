"""Encode one weight with a format, without planner or file, as the pipeline does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbits.quant_ops.formats import FormatOptions, get_format
from fewbits.quant_ops.methods import Layer, choose, get_method, layer_generator
from fewbits.quant_ops.sources import DTYPE_NAMES, spec_of
from fewbits.quant_ops.spec import LayerInput, TensorSpec

CANONICAL = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "int8_tensorwise",
    "int8_tensorwise:tensor",
    "int8_tensorwise:convrot",
    "int8_blockwise",
    "int8_lodewise",
    "mxfp8",
    "nvfp4",
    "convrot_w4a4",
    "asym_w4a8_int8",
    "bnb_nf4",
    "bnb_fp4",
)
VARIANTS = {
    "float8_e4m3fn_blockwise": {"block_size": 16},
    "float8_e4m3fn_block3d": {"block_size": 16},
    "int8_blockwise": {"block_size": 16},
    "int8_lodewise": {"block_size": 16},
    "int8_tensorwise:tensor": {"scaling": "tensor"},
    "int8_tensorwise:convrot": {"convrot": True, "convrot_groupsize": 64},
    "convrot_w4a4": {"convrot_groupsize": 64},
    "asym_w4a8_int8": {"convrot_groupsize": 64},
}


def options_of(name: str, stated: Mapping[str, object]) -> FormatOptions:
    """The format's options; blocks may be as small as the vectors of the tests."""
    kind, size = get_format(name).Options, stated.get("block_size")
    if size is None or size in kind.values("block_size"):
        return get_format(name).configure(stated)
    small = type("Small", (kind,), {"choices": {**kind.choices, "block_size": (size,)}})
    return small(**stated)


def wish(case: str) -> tuple[str, FormatOptions]:
    """`int8_tensorwise:convrot` -> format name and its options; blocks and rotations are small."""
    name = case.partition(":")[0]
    return name, options_of(name, VARIANTS.get(case, {}))


def layer_of(weight: torch.Tensor) -> LayerInput:
    return LayerInput(tuple(weight.shape), DTYPE_NAMES[weight.dtype])


def encode(
    name: str,
    weight: torch.Tensor,
    options: FormatOptions | Mapping[str, object],
    method: str = "nearest",
) -> tuple[dict[str, torch.Tensor], dict]:
    """(stored tensors by suffix, marker)."""
    format, layer = get_format(name), layer_of(weight)
    if not isinstance(options, FormatOptions):
        options = options_of(name, options)
    prepared = format.prepare(weight, options)
    chosen = get_method(method)
    generator = layer_generator(0, name, prepared.device)
    choice = choose(
        chosen, Layer(prepared, format.grid(layer, options), chosen.configure({}), generator)
    )
    return format.pack(choice.codes, choice.scale, options), format.marker(layer, options)


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {suffix: spec_of(suffix, tensor) for suffix, tensor in tensors.items()}


def decode(name: str, tensors: dict[str, torch.Tensor], marker: dict) -> torch.Tensor:
    """(N, K) float32 by the package's own decoder, from nothing but what is stored."""
    format, specs = get_format(name), specs_of(tensors)
    options = format.options_from(marker, specs)
    return format.dequantize(tensors, format.stored_layer(marker, specs), options)
