"""bitsandbytes, with nested absmax too, and a converter that used its names with other bytes.

| stored | becomes |
|---|---|
| `weight` U8 (bytes, 1), or another dtype viewed as bytes | `weight` U8 (N, K/2), the same bytes |
| `weight.absmax` F32 | `absmax` F32 (blocks,) |
| `weight.absmax` U8 with `.nested_absmax`, `.nested_quant_map` | table[code] * nested + offset |
| `weight.quant_map` F32 (16,) | dropped if that of bnb_nf4 or bnb_fp4; another table: decoded |
| `weight.quant_state.bitsandbytes__nf4`, `__fp4` | JSON: shape, group size, dtype |
| the other converter: low nibble first, FP4 codes by magnitude | swapped, codes renumbered |
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import CheckpointError
from ...strict_json import shown
from .base import ImportOptions, StoredLayer, Tensors, Translation
from .four_bit import (
    Codes,
    finite,
    group_size,
    logical_shape,
    nibble_order,
    plain_absmax,
    quant_state,
    source_dtype,
    stored_table,
    translate_codes,
)

STATE = "weight.quant_state.bitsandbytes__"
LOW_NIBBLE = "bitsandbytes-low-nibble"


class BitsAndBytes:
    def claims(self, layer: StoredLayer) -> bool:
        return any(suffix.startswith(STATE) for suffix in layer.specs)

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        suffix = next(suffix for suffix in layer.specs if suffix.startswith(STATE))
        text, state = quant_state(layer, suffix)
        kind = state.get("quant_type", suffix[len(STATE) :])
        if kind not in ("nf4", "fp4", "af4"):
            raise CheckpointError(f"{suffix} says quant_type {shown(kind)}; nf4 and fp4 are read")
        if "weight.absmax" not in layer.specs:
            raise CheckpointError("weight.absmax is missing; bitsandbytes layers need it")
        nested = "weight.nested_absmax" in layer.specs
        table = stored_table(layer, "weight.quant_map")
        order = nibble_order(
            layer,
            options,
            kind=kind,
            table=table,
            nested=nested,
            state_text=text,
            absmax="weight.absmax",
        )
        codes = Codes(
            kind=kind,
            group_size=group_size(state.get("blocksize")),
            shape=logical_shape(layer, state.get("shape"), options),
            order=order,
            table=table,
            absmax=_nested(layer, state) if nested else plain_absmax(layer, "weight.absmax"),
            absmax_count=layer.specs["weight.absmax"].numel,
            dtype=source_dtype(state.get("dtype")),
        )
        if order.first == "low":
            return translate_codes(LOW_NIBBLE, layer, codes, "low nibble first: swapped")
        if nested:
            note = "nested absmax decoded"
            return translate_codes("bitsandbytes-nested", layer, codes, note)
        return translate_codes("bitsandbytes", layer, codes, "codes kept")


def _nested(layer: StoredLayer, state: dict) -> Callable[[Tensors], torch.Tensor]:
    """How to decode absmax.

    Raises:
        CheckpointError: its tensors do not fit each other, or its numbers are none.
    """
    size = group_size(state.get("nested_blocksize"))
    offset = finite(state.get("nested_offset"), "nested_offset")
    codes, nested = layer.specs["weight.absmax"], layer.specs["weight.nested_absmax"]
    table = layer.specs.get("weight.nested_quant_map")
    if codes.dtype != "U8":
        raise CheckpointError(f"weight.absmax is {codes.dtype}, nested it is U8 codes")
    if table is None or table.numel != 256:
        found = "missing" if table is None else f"of {table.numel} entries"
        raise CheckpointError(f"weight.nested_quant_map is {found}; 256 are needed")
    blocks = -(-codes.numel // size)
    if nested.numel != blocks:
        raise CheckpointError(
            f"weight.nested_absmax has {nested.numel} entries, {codes.numel} codes in groups of "
            f"{size} need {blocks}"
        )
    size = min(size, codes.numel)

    def absmax(tensors: Tensors) -> torch.Tensor:
        return nested_absmax(
            tensors["weight.absmax"],
            tensors["weight.nested_quant_map"],
            tensors["weight.nested_absmax"],
            size,
            offset=offset,
        )

    return absmax


def nested_absmax(
    codes: torch.Tensor, table: torch.Tensor, absmax: torch.Tensor, size: int, offset: float
) -> torch.Tensor:
    """table[code] * absmax[i // size] + offset, float32; the product is rounded before the sum."""
    codes = codes.reshape(-1)
    scale = absmax.float().reshape(-1).repeat_interleave(size)[: codes.numel()]
    return torch.index_select(table.float().reshape(-1), 0, codes.int()).mul_(scale).add_(offset)
