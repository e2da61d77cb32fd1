"""4-bit layers of convert_to_quant, December 2025, without comfy_quant: D19L by its quant_state,
D14L by its dtypes.

| stored | becomes |
|---|---|
| D19L: bitsandbytes' keys without the `.weight.` inside, flat `weight` | nibbles swapped |
| D14L: `weight` U8 flat, `scale_weight` 1-D, g = 2 * bytes / scales | as D14; nf4 or fp4 is recorded nowhere |
"""

from __future__ import annotations

from ...errors import CheckpointError
from .base import ImportOptions, StoredLayer, Translation
from .four_bit import (
    Codes,
    group_size,
    logical_shape,
    nibble_order,
    quant_state,
    source_dtype,
    stored_table,
    translate_codes,
)

STATE = "quant_state.bitsandbytes__"


class StateWithoutWeight:
    """D19L."""

    def claims(self, layer: StoredLayer) -> bool:
        return "absmax" in layer.specs and any(suffix.startswith(STATE) for suffix in layer.specs)

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        suffix = next(suffix for suffix in layer.specs if suffix.startswith(STATE))
        text, state = quant_state(layer, suffix)
        kind = state.get("quant_type", suffix[len(STATE) :])
        if kind not in ("nf4", "fp4", "af4"):
            raise CheckpointError(f"{suffix} says quant_type {kind!r}; nf4, fp4 and af4 are read")
        table = stored_table(layer, "quant_map")
        order, warnings = nibble_order(layer, options, kind=kind, table=table, state_text=text)
        codes = Codes(
            kind=kind,
            group_size=group_size(state.get("blocksize")),
            shape=logical_shape(layer, state.get("shape"), options),
            order=order,
            table=table,
            absmax=lambda tensors: tensors["absmax"],
            absmax_count=layer.specs["absmax"].numel,
            dtype=source_dtype(state.get("dtype")),
        )
        return translate_codes("D19L", layer, codes, "flat 4-bit, low nibble first", warnings)


class BytesWithScales:
    """D14L."""

    def claims(self, layer: StoredLayer) -> bool:
        scale = layer.specs.get("scale_weight")
        return (
            layer.weight.dtype == "U8"
            and scale is not None
            and len(scale.shape) == len(layer.weight.shape) == 1
        )

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        scales = layer.specs["scale_weight"].numel
        if options.assume is None:
            raise CheckpointError(
                "4-bit weight without a word whether it is NF4 or FP4; say --assume nf4 or "
                "--assume fp4"
            )
        if not scales or 2 * layer.weight.nbytes % scales:
            raise CheckpointError(
                f"weight has {2 * layer.weight.nbytes} codes for {scales} scales; the file is "
                "damaged"
            )
        codes = Codes(
            kind=options.assume,
            group_size=2 * layer.weight.nbytes // scales,
            shape=logical_shape(layer, None, options),
            order="low",
            table=None,
            absmax=lambda tensors: tensors["scale_weight"],
            absmax_count=scales,
        )
        return translate_codes("D14L", layer, codes, f"flat 4-bit, taken for {options.assume}")
