"""LLM.int8, as bitsandbytes and transformers store it.

| stored | becomes |
|---|---|
| `weight` I8 (N, K) | the same codes |
| `SCB` F32 (N,), the largest magnitude of each row | `weight_scale` (N, 1) = SCB / 127 |
| `weight_format` U8, 0: rows in order | dropped; others are tilings of one kind of GPU: refused |

w = code * SCB / 127. The columns that it computes in 16 bits while running are stored as codes too.
"""

from __future__ import annotations

from ...errors import CheckpointError
from .base import ImportOptions, StoredLayer, Tensors, Translation
from .scaled import ScaleOf, translate_scaled


class LlmInt8:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.weight.dtype == "I8" and "SCB" in layer.specs and layer.marker is None

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        if "weight_format" in layer.specs and layer.number("weight_format") != 0:
            raise CheckpointError(
                f"weight_format is {layer.number('weight_format')}: the codes are tiled for one "
                "kind of GPU; save the model again with a newer bitsandbytes, or start from the "
                "original"
            )
        scale = ScaleOf("SCB", _row_scale)
        return translate_scaled("llm-int8", layer, "codes kept, SCB / 127", scale=scale)


def _row_scale(tensors: Tensors):
    return tensors["SCB"].float() / 127
