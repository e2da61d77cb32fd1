"""FP8 in blocks as DeepSeek's models and transformers store it.

| stored | becomes |
|---|---|
| `weight` F8_E4M3, `weight_scale_inv` F32 of blocks that divide N and K | labelled by shape |
| `weight_scale_inv` (ceil(N / 128), ceil(K / 128)): the last blocks are smaller | decoded |

Despite its name it multiplies: w = code * weight_scale_inv.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...spec import FLOAT_DTYPES
from .base import FP8, ImportOptions, StoredLayer, Tensors, Translation, floating
from .scaled import ScaleOf, levels_of, translate_scaled

SCALE = "weight_scale_inv"
BLOCK = 128
DIALECT = "fp8-scale-inv"


class Fp8ScaleInv:
    def claims(self, layer: StoredLayer) -> bool:
        return SCALE in layer.specs and layer.weight.dtype in FP8

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        other = layer.first("weight_scale", "scale_weight")
        if other is not None or layer.marker is not None:
            beside = other or "JSON of ComfyUI"
            raise CheckpointError(
                f"{SCALE} beside {beside}: which of them counts is not said; start from the "
                "original model"
            )
        scale, codes = layer.specs[SCALE], layer.codes
        ragged = len(layer.weight.shape) == 2 and _is_ragged(layer.matrix, scale.shape)
        if not ragged or scale.dtype not in FLOAT_DTYPES:
            read = ScaleOf(SCALE, lambda tensors: tensors[SCALE])
            return translate_scaled(DIALECT, layer, "codes kept", scale=read)
        n, k = layer.matrix

        def decode(tensors: Tensors) -> torch.Tensor:
            blocks = tensors[SCALE].float()
            spread = blocks.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
            return levels_of(tensors[codes].dtype).widen(tensors[codes]) * spread

        note = f"blocks of {BLOCK} that end within the matrix: decoded"
        return floating(DIALECT, layer, (n, k), decode, note=note)


def _is_ragged(matrix: tuple[int, int], blocks: tuple[int, ...]) -> bool:
    """Whether blocks of 128 cover the matrix, and not exactly."""
    covering = tuple(-(-size // BLOCK) for size in matrix)
    return blocks == covering and any(size % BLOCK for size in matrix)
