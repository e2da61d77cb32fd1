"""GPTQ, as AutoGPTQ and GPTQModel store it.

| stored | meaning |
|---|---|
| `qweight` I32 (K * bits / 32, N) | codes, the first row of a number in its lowest bits |
| `qzeros` I32 (groups, N * bits / 32) | zero points, the first column in the lowest bits |
| `scales` F16 (groups, N) | (code - zero) * scale |
| `g_idx` I32 (K,) | the group of a row; without it the rows lie in groups in order |

The first version of the format stores zero - 1, the second the zero itself, and no file says which.
Symmetric codes, which nearly all files have, show it: their zero is 2^(bits - 1) everywhere, so
that all stored ones are that or one less. Zeros of another kind are refused.
"""

from __future__ import annotations

import torch

from ...errors import CheckpointError
from ...spec import FLOAT_DTYPES
from .base import ImportOptions, StoredLayer, Tensors, Translation, floating

BITS = (2, 4, 8)  # 3 bits straddle numbers
WORD = 32


class Gptq:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.codes == "qweight" and _bits(layer) is not None

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        bits = _bits(layer)
        n, k = layer.weight.shape[1], layer.weight.shape[0] * WORD // bits
        groups = layer.specs["scales"].shape[0]
        if "g_idx" in layer.specs and layer.specs["g_idx"].shape != (k,):
            raise CheckpointError(f"g_idx is {list(layer.specs['g_idx'].shape)}, K is {k}")
        if "g_idx" not in layer.specs and k % groups:
            raise CheckpointError(
                f"{k} columns in {groups} groups: they are not alike, and no g_idx"
            )
        zero = _only_zero(layer, bits)
        dtype = layer.specs["scales"].dtype

        def decode(tensors: Tensors) -> torch.Tensor:
            return decode_gptq(tensors, bits, zero)

        return floating(
            "gptq", layer, (n, k), decode, note=f"GPTQ, {bits} bit: decoded", dtype=dtype
        )


def _bits(layer: StoredLayer) -> int | None:
    """Bits of a code where all tensors are GPTQ's by shape; None for any other packing."""
    zeros, scales = layer.specs.get("qzeros"), layer.specs.get("scales")
    if zeros is None or scales is None or layer.weight.dtype != "I32" or zeros.dtype != "I32":
        return None
    shapes = (layer.weight.shape, zeros.shape, scales.shape)
    if any(len(shape) != 2 for shape in shapes) or scales.dtype not in FLOAT_DTYPES:
        return None
    (rows, n), (groups, packed), wanted = shapes
    found = (bits for bits in BITS if packed * WORD == n * bits)
    bits = next(found, None)
    if rows and groups and wanted == (groups, n):
        return bits
    return None


def _only_zero(layer: StoredLayer, bits: int) -> int:
    """The zero point of symmetric codes, whichever version stored it.

    Raises:
        CheckpointError: the stored ones are not those of symmetric codes.
    """
    stored = _unpacked(layer.read("qzeros"), bits)
    middle = 1 << (bits - 1)
    low, high = (int(value) for value in torch.aminmax(stored))
    if low == high and low in (middle - 1, middle):
        return middle
    raise CheckpointError(
        f"GPTQ with zero points from {low} to {high}: whether they are stored less one is not said "
        "in the file; start from the original model"
    )


def decode_gptq(tensors: Tensors, bits: int, zero: int) -> torch.Tensor:
    """(N, K) float32: (code - zero) * scale of the row's group of the stored (K, N) matrix.

    Raises:
        CheckpointError: g_idx names a group that there is not.
    """
    codes = _unpacked(tensors["qweight"].t(), bits).t()
    scales = tensors["scales"].float()
    k, groups = codes.shape[0], scales.shape[0]
    group = torch.arange(k, device=codes.device) * groups // k
    if "g_idx" in tensors:
        group = tensors["g_idx"].long()
        if int(group.min()) < 0 or int(group.max()) >= groups:
            raise CheckpointError(f"g_idx goes from {int(group.min())} to {int(group.max())}")
    return (codes.float() - zero).mul_(scales[group]).t().contiguous()


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, columns) int32 -> (rows, columns * 32 / bits) codes, lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    codes = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)
