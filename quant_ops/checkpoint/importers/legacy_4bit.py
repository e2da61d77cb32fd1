"""4-bit layers of convert_to_quant, December 2025, without comfy_quant, known by quant_state or
by dtypes.

| stored | becomes |
|---|---|
| bitsandbytes' keys without the `.weight.` inside, flat `weight` | nibbles swapped |
| `weight` U8 flat, `scale_weight` 1-D, g = 2 * bytes / scales | the same; nf4 or fp4: not said |
"""

from __future__ import annotations

from ...errors import CheckpointError
from ...strict_json import shown
from .base import ImportOptions, StoredLayer, Translation
from .four_bit import (
    Codes,
    Order,
    group_size,
    logical_shape,
    nibble_order,
    plain_absmax,
    quant_state,
    source_dtype,
    stored_table,
    translate_codes,
)

STATE = "quant_state.bitsandbytes__"


class StateWithoutWeight:
    """quant_state under bitsandbytes' names, without `.weight.`."""

    def claims(self, layer: StoredLayer) -> bool:
        return "absmax" in layer.specs and any(suffix.startswith(STATE) for suffix in layer.specs)

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        suffix = next(suffix for suffix in layer.specs if suffix.startswith(STATE))
        text, state = quant_state(layer, suffix)
        kind = state.get("quant_type", suffix[len(STATE) :])
        if kind not in ("nf4", "fp4", "af4"):
            raise CheckpointError(
                f"{suffix} says quant_type {shown(kind)}; nf4, fp4 and af4 are read"
            )
        table = stored_table(layer, "quant_map")
        order = nibble_order(layer, options, kind=kind, table=table, state_text=text)
        codes = Codes(
            kind=kind,
            group_size=group_size(state.get("blocksize")),
            shape=logical_shape(layer, state.get("shape"), options),
            order=order,
            table=table,
            absmax=plain_absmax(layer, "absmax"),
            absmax_count=layer.specs["absmax"].numel,
            dtype=source_dtype(state.get("dtype")),
        )
        return translate_codes("flat-4bit-with-state", layer, codes, "nibbles swapped")


class BytesWithScales:
    """Flat bytes and 1-D scales, nothing else."""

    def claims(self, layer: StoredLayer) -> bool:
        scale = layer.specs.get("scale_weight")
        return (
            layer.weight.dtype == "U8"
            and scale is not None
            and len(scale.shape) == len(layer.weight.shape) == 1
        )

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        scales = layer.specs["scale_weight"].numel
        if options.assume not in ("nf4", "fp4"):
            raise CheckpointError(
                "4-bit weight without a word whether it is NF4 or FP4; say which to assume",
                option="assume",
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
            order=Order("low"),
            table=None,
            absmax=plain_absmax(layer, "scale_weight"),
            absmax_count=scales,
        )
        note = f"taken for {options.assume}, nibbles swapped"
        return translate_codes("flat-4bit-bytes", layer, codes, note, asked=("assume",))
