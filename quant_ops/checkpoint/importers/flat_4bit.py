"""4-bit layers of convert_to_quant, December 2025: flat weight, low nibble first, `<layer>.absmax`.

| stored | becomes |
|---|---|
| `weight` U8 (numel/2,), low nibble first | `weight` U8 (N, K/2), nibbles swapped |
| `absmax` F32, any shape | `absmax` F32 (blocks,) |
| JSON `params.group_size`, no shape | shape from the original, or from the bias |
| JSON with `shape`, `quant_map` | bnb_nf4 or bnb_fp4; `bnb_af4` or another table: decoded |
| `weight` U8 (N, K) of zeros with 3-D `absmax`: the "zero layer" defect | a layer of zeros |
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...formats.bnb_4bit import PREFIX
from ...spec import LayerInput
from .base import ImportOptions, StoredLayer, Tensors, Translation, quantized, resolved
from .four_bit import (
    TABLES,
    WRITTEN,
    Codes,
    group_size,
    logical_shape,
    nibble_order,
    plain_absmax,
    source_dtype,
    stated_order,
    stored_table,
    translate_codes,
)

ZERO_BYTE = {"nf4": 0x77, "fp4": 0x00}  # two codes of value 0


class Flat4Bit:
    def claims(self, layer: StoredLayer) -> bool:
        return _kind(layer) is not None and not _is_ours(layer)

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        kind = _kind(layer)
        if "absmax" not in layer.specs:
            raise CheckpointError(f"absmax is missing; {PREFIX}{kind} needs it")
        size = group_size(layer.said.get("group_size", layer.said.get("blocksize")))
        if is_zero_defect(layer, size):
            return _zero_layer(layer, kind, size)
        table = stored_table(layer, "quant_map")
        order = nibble_order(layer, options, kind=kind, table=table)
        codes = Codes(
            kind=kind,
            group_size=size,
            shape=logical_shape(layer, None, options),
            order=order,
            table=table,
            absmax=plain_absmax(layer, "absmax"),
            absmax_count=layer.specs["absmax"].numel,
            dtype=source_dtype(layer.said.get("dtype")),
        )
        stated = "shape" in layer.said
        return translate_codes(
            "flat-4bit-with-shape" if stated else "flat-4bit", layer, codes, _note(order.first)
        )


def _note(order: str) -> str:
    if order == "low":
        return "nibbles swapped"
    return "JSON completed"


def _kind(layer: StoredLayer) -> str | None:
    name = layer.said.get("format") or f"{PREFIX}{layer.said.get('quant_type', '')}"
    if layer.marker is None or not isinstance(name, str) or not name.startswith(PREFIX):
        return None
    kind = name.removeprefix(PREFIX)
    if kind in TABLES:
        return kind
    return None


def _is_ours(layer: StoredLayer) -> bool:
    high = stated_order(layer) == "high"
    return high and layer.said.get("format") in WRITTEN.values() and len(layer.weight.shape) == 2


def is_zero_defect(layer: StoredLayer, size: int) -> bool:
    """The shapes of a layer whose zeros were stored unpacked: one byte per weight."""
    absmax = layer.specs["absmax"]
    return (
        len(layer.weight.shape) == 2
        and len(absmax.shape) == 3
        and absmax.numel * size == layer.weight.numel
    )


def _zero_layer(layer: StoredLayer, kind: str, size: int) -> Translation:
    options = resolved(WRITTEN[kind], {"block_size": size}) if kind in WRITTEN else None
    if options is None:
        raise CheckpointError(
            f"zero layer of {PREFIX}{kind} in groups of {size}; start from the original model"
        )
    n, k = layer.matrix
    blocks = layer.specs["absmax"].numel

    def convert(tensors: Tensors) -> Tensors:
        if tensors["weight"].any():
            raise CheckpointError(
                f"layer '{layer.name}': unpacked 4-bit weight that is not zero; the file is damaged"
            )
        packed = torch.full(
            (n, k // 2), ZERO_BYTE[kind], dtype=torch.uint8, device=tensors["weight"].device
        )
        return {"weight": packed, "absmax": torch.ones(blocks, device=packed.device)}

    source = LayerInput((n, k), source_dtype(layer.said.get("dtype")))
    return quantized(
        "flat-4bit",
        layer,
        WRITTEN[kind],
        source,
        options=options,
        convert=convert,
        note="zero layer stored unpacked: made zero",
    )
