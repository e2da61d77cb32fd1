"""4-bit text encoders of nunchaku, in the packing of TinyChat.

| stored | meaning |
|---|---|
| `qweight` I16 (N/4, K) | codes, in the order of importers/svdquant.py's AWQ |
| `scales`, `scaled_zeros` 16 bit (groups, N) | code * scale + zero, in groups of 128 columns |

Groups are filled up to a multiple of 8.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from .base import ImportOptions, StoredLayer, Tensors, Translation, floating
from .svdquant import DEPTH, HALF, awq_codes

ZEROS = "scaled_zeros"
GROUP = 128
FILLED = 8  # groups that one number of another packing would hold


class TinyChat:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.codes == "qweight" and layer.weight.dtype == "I16" and ZEROS in layer.specs

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        rows, k = layer.matrix
        n, groups = 4 * rows, k // GROUP
        scale, zeros = layer.specs.get("scales"), layer.specs[ZEROS]
        wanted = (-(-groups // FILLED) * FILLED, n)
        right = scale is not None and scale.shape == zeros.shape == wanted
        if not right or k % GROUP or k % DEPTH or {scale.dtype, zeros.dtype} - set(HALF):
            raise CheckpointError(
                f"qweight I16 {[rows, k]} with scales of another shape than {list(wanted)}: a "
                "packing that is not read; start from the original model"
            )

        def decode(tensors: Tensors) -> torch.Tensor:
            spread = (
                tensors[key].float()[:groups].t().repeat_interleave(GROUP, 1)
                for key in ("scales", ZEROS)
            )
            scales, shifts = spread
            return awq_codes(tensors["qweight"], (n, k)).mul_(scales).add_(shifts)

        note = "AWQ of nunchaku's text encoders: decoded"
        return floating("tinychat", layer, (n, k), decode, note=note, dtype=scale.dtype)
