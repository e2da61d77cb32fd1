"""4-bit codes of other runtimes under the name `qweight`.

| stored | answer |
|---|---|
| AutoAWQ: `qweight` I32 (K, N/8), `qzeros` I32 (K/G, N/8), `scales` F16 (K/G, N) | decoded |
| any other | refused |

AutoAWQ means (code - zero) * scale, and packs columns 0, 2, 4, 6, 1, 3, 5, 7 of eight into one
number, lowest bits first.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from .base import ImportOptions, StoredLayer, Tensors, Translation, floating

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # column of eight -> which four bits hold it
PACK = 8  # codes in one I32


class PackedInt4:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.codes == "qweight"

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        shape = _awq_shape(layer)
        if shape is None:
            raise CheckpointError(
                f"qweight {layer.weight.dtype} {list(layer.weight.shape)} is no packing of AutoAWQ "
                "or GPTQ that is read here; start from the original model"
            )
        return floating(
            "auto-awq", layer, shape, decode_auto_awq, note="AutoAWQ: decoded", dtype="F16"
        )


def _awq_shape(layer: StoredLayer) -> tuple[int, int] | None:
    """(N, K) where all three tensors are AutoAWQ's by shape; None for any other packing."""
    zeros, scales = layer.specs.get("qzeros"), layer.specs.get("scales")
    if zeros is None or scales is None or "g_idx" in layer.specs or layer.weight.dtype != "I32":
        return None
    shapes = (layer.weight.shape, zeros.shape, scales.shape)
    if any(len(shape) != 2 for shape in shapes) or zeros.dtype != "I32":
        return None
    (k, packed), (groups, zeros_packed), (scale_groups, n) = shapes
    fits = packed == zeros_packed and packed * PACK == n and groups == scale_groups
    if fits and groups and k % groups == 0:
        return (n, k)
    return None


def decode_auto_awq(tensors: Tensors) -> torch.Tensor:
    """(N, K) float32: (code - zero) * scale per group of rows of the stored (K, N) matrix."""
    codes, zeros = _unpacked(tensors["qweight"]), _unpacked(tensors["qzeros"])
    scales = tensors["scales"].float()
    size = codes.shape[0] // scales.shape[0]
    zeros, scales = (part.repeat_interleave(size, 0) for part in (zeros, scales))
    return (codes - zeros).mul_(scales).t().contiguous()


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    """(rows, columns/8) int32 -> (rows, columns) float32 codes 0..15."""
    shifts = torch.tensor([4 * place for place in PLACES], dtype=torch.int32, device=packed.device)
    codes = (packed[:, :, None] >> shifts) & 15
    return codes.reshape(packed.shape[0], -1).float()
