"""What a canonical layer may become besides itself: bitsandbytes' keys, or a plain weight.

| bitsandbytes key | content |
|---|---|
| `<base>.weight` | U8 (bytes, 1), the same bytes |
| `<base>.weight.absmax` | F32 (blocks,), the same values |
| `<base>.weight.quant_map` | F32 (16,), the table in code order |
| `<base>.weight.quant_state.bitsandbytes__nf4`, `__fp4` | U8, the JSON that bitsandbytes writes |
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from ..formats.base import dtype_to_json
from .importers.base import Tensors, Translation
from .importers.four_bit import TABLES, WRITTEN

KINDS = {name: kind for kind, name in WRITTEN.items()}


def to_bf16(made: Translation) -> Translation:
    """Decoded in float32, rounded once."""
    return made.decoded("BF16", "decoded")


def to_bitsandbytes(made: Translation) -> Translation:
    """bnb_nf4 and bnb_fp4 under bitsandbytes' names; every other layer in the dtype it was made
    from.
    """
    kind = KINDS.get(made.format)
    if kind is None:
        return made.decoded(made.float_dtype, "bitsandbytes has no such format: decoded")
    n, k = made.layer.shape
    state = {
        "quant_type": kind,
        "blocksize": made.options.block_size,
        "dtype": dtype_to_json(made.float_dtype),
        "shape": [n, k],
    }
    text = json.dumps(state).encode("utf-8")
    suffix = f"weight.quant_state.bitsandbytes__{kind}"

    def convert(tensors: Tensors) -> Tensors:
        stored = made.convert(tensors)
        return {
            "weight": stored["weight"].reshape(-1, 1),
            "weight.absmax": stored["absmax"],
            "weight.quant_map": torch.tensor(TABLES[kind], dtype=torch.float32),
            suffix: torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }

    outputs = {
        "weight": ("U8", (n * k // 2, 1)),
        "weight.absmax": made.outputs["absmax"],
        "weight.quant_map": ("F32", (16,)),
        suffix: ("U8", (len(text),)),
    }
    return Translation(
        made.dialect, outputs, convert, "bitsandbytes keys", float_dtype=made.float_dtype
    )


# `fewbits convert --to`: None keeps what our formats are.
TARGETS: dict[str, Callable[[Translation], Translation] | None] = {
    "comfy_quant": None,
    "bnb": to_bitsandbytes,
    "bf16": to_bf16,
}
