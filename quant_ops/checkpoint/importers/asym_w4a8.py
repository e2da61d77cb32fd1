"""asym_w4a8_int8 of other writers; ours, with the table and e4m3fn group scales, is plain
comfy_quant.

| stored | decode |
|---|---|
| `weight_s_rel` U8 | the bytes of e4m3fn: kept |
| `weight_s_rel` F32 | as it is: decoded |
| no `weight_codebook` | level = code - 8: decoded |
| `weight_correction` (K/g, N) | added to the rotated weight before the inverse rotation: decoded |
| rows of 3K/4 bytes | 6-bit codes, level = code - 32: decoded |

q8 = clamp(round(level * s_rel), +-127); W = rotate(q8 * s_channel + correction, G).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ....kernels.hadamard import rotate
from ....kernels.packing import unpack_nibbles
from ....kernels.w4a8 import GROUP
from ...errors import CheckpointError
from ...formats.asym_w4a8 import AsymW4A8 as Written
from ...formats.convrot import stored_group
from ...spec import LayerInput
from ...strict_json import shown
from .base import ImportOptions, StoredLayer, Tensors, Translation, fit, floating

NAME = Written.name


class AsymW4A8:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.said.get("format") == NAME and not _is_ours(layer)

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation | None:
        if NAME in options.host_formats:
            return None  # the host's own layout reads these variants
        shape, decode = decode_asym(layer)
        return floating(
            "asym_w4a8", layer, shape, decode, note="variant of another writer: decoded"
        )


def decode_asym(
    layer: StoredLayer,
) -> tuple[tuple[int, int], Callable[[Tensors], torch.Tensor]]:
    """(logical shape, stored tensors -> float32 of it) of any variant.

    Raises:
        CheckpointError: a tensor is missing, or the sizes are neither 4 nor 6 bits a weight.
    """
    (n, row_bytes), groups = layer.matrix, _groups(layer)
    size = layer.said.get("group_size", GROUP)
    if type(size) is not int or not 0 < size <= 8 * row_bytes:
        raise CheckpointError(
            f"group_size is {shown(size)}, a number up to the weights of a row is needed"
        )
    k = groups * size
    bits = 8 * row_bytes / k if k else 0
    if bits not in (4, 6):
        raise CheckpointError(
            f"rows of {row_bytes} bytes for K={k} are {bits:g} bits a weight; 4 and 6 are read"
        )
    group = stored_group(layer.said, LayerInput((n, k), None))

    def decode(tensors: Tensors) -> torch.Tensor:
        return rotate(_rotated(tensors, bits == 6, size), group)

    return (n, k), decode


def _groups(layer: StoredLayer) -> int:
    """Groups of a row.

    Raises:
        CheckpointError: a tensor is missing, or does not fit the others.
    """
    n, specs = layer.matrix[0], layer.specs
    for suffix in ("weight_s_rel", "weight_s_channel"):
        if suffix not in specs:
            raise CheckpointError(f"{suffix} is missing; {NAME} needs it")
    relative = specs["weight_s_rel"].shape
    groups = relative[1] if len(relative) == 2 else 0
    wanted = {
        "weight_s_rel": (n, groups),
        "weight_correction": (groups, n),
        "weight_codebook": (16,),
    }
    for suffix, shape in wanted.items():
        if suffix in specs and specs[suffix].shape != shape:
            raise CheckpointError(
                f"{suffix} is {list(specs[suffix].shape)}, {list(shape)} is needed"
            )
    if specs["weight_s_channel"].numel != n:
        raise CheckpointError(
            f"weight_s_channel has {specs['weight_s_channel'].numel} entries for {n} rows"
        )
    if layer.weight.dtype not in ("I8", "U8"):
        raise CheckpointError(f"weight is {layer.weight.dtype}, packed codes are I8 or U8")
    return groups


def _is_ours(layer: StoredLayer) -> bool:
    codebook, relative = layer.specs.get("weight_codebook"), layer.specs.get("weight_s_rel")
    plain = codebook is not None and relative is not None and "weight_correction" not in layer.specs
    sizes = (
        plain
        and len(relative.shape) == 2
        and relative.shape[1] * GROUP == 2 * layer.weight.shape[-1]
    )
    return sizes and codebook.numel == 16 and relative.dtype in ("F8_E4M3", "U8")


def _rotated(tensors: Tensors, six_bits: bool, size: int) -> torch.Tensor:
    """(N, K) float32, still rotated."""
    if six_bits:
        levels = _six_bit_codes(tensors["weight"]).float() - 32
    else:
        codes = unpack_nibbles(tensors["weight"], high_first=False)
        table = tensors.get("weight_codebook")
        levels = codes.float() - 8 if table is None else table.float()[codes.int()]
    relative = tensors["weight_s_rel"]
    if relative.dtype == torch.uint8:
        relative = fit(relative, "F8_E4M3", tuple(relative.shape))
    n, k = levels.shape
    grid = (
        (levels.view(n, k // size, size) * relative.float()[:, :, None]).round_().clamp_(-127, 127)
    )
    rotated = grid.view(n, k) * tensors["weight_s_channel"].float().reshape(n, 1)
    if "weight_correction" in tensors:
        rotated = rotated + tensors["weight_correction"].float().t().repeat_interleave(size, 1)
    return rotated


def _six_bit_codes(rows: torch.Tensor) -> torch.Tensor:
    """(N, 3K/4) bytes -> (N, K) codes 0..63: K/2 bytes of low nibbles, then K/4 bytes of top bit
    pairs.
    """
    n, row_bytes = rows.shape
    k = row_bytes * 4 // 3
    rows = rows.contiguous().view(torch.uint8)
    low = unpack_nibbles(rows[:, : k // 2], high_first=False)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=rows.device)
    top = (rows[:, k // 2 :, None] >> shifts) & 3
    return low | (top.reshape(n, k) << 4)
