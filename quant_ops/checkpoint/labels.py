"""The label of an FP8 or INT8 layer, read off the dtype and the scale's shape; never off user
text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import CheckpointError
from ..formats import FORMATS, Arrangement, get_format

# Tables that ComfyUI looks rows up in.
EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|shared|token_embedding|word_embeddings|wte|relative_attention_bias)"
)

TENSOR, ROW, GROUP, TILE = Arrangement


def labels() -> dict[str, dict[Arrangement, str]]:
    """dtype of the codes -> arrangement of the scales -> format.

    Where two formats store the same, the one that was registered first is meant.
    """
    table: dict[str, dict[Arrangement, str]] = {}
    for format in FORMATS.values():
        if format.codes_per_byte == 1:
            for arrangement in format.arrangements:
                table.setdefault(format.code_dtype, {}).setdefault(arrangement, format.name)
    return table


def is_scaled(name: object) -> bool:
    """Whether a format is known by the dtype of its codes and the shape of its scales."""
    return any(name in formats.values() for formats in labels().values())


@dataclass(frozen=True)
class Label:
    """A format, and how it shares scales; `size` where there are blocks."""

    format: str
    geometry: Arrangement
    size: int | None = None

    @property
    def options(self) -> dict[str, object]:
        """As the format spells them; it refuses a block size that is read but not written."""
        if self.size is not None:
            return {"block_size": self.size}
        spelled = "scaling" in get_format(self.format).Options.names()
        if spelled:
            return {"scaling": self.geometry.value}
        return {}


def label_of(
    dtype: str,
    shape: tuple[int, int],
    scale_shape: tuple[int, ...],
    tag: str = "",
    group_size: int | None = None,
) -> Label:
    """The one reading of these shapes.

    Args:
        dtype: safetensors dtype of the codes.
        shape: (N, K).
        tag, group_size: what the layer's JSON says; consulted only for a single scale of one
            whole-layer block.

    Raises:
        CheckpointError: no reading, with what was found and what is allowed.
    """
    table = labels()
    known = table.get(dtype)
    if known is None:
        raise CheckpointError(f"weight is {dtype}; a scaled weight is one of {', '.join(table)}")
    n, k = shape
    # one block may be the whole layer; only a tag can say so
    if math.prod(scale_shape) == 1 and n == k == group_size and known.get(TILE) == tag:
        return Label(tag, TILE, n)
    geometry, size = _geometry(shape, tuple(scale_shape))
    if geometry not in known:
        raise CheckpointError(
            f"weight_scale is {list(scale_shape)}, {dtype} {n}x{k} allows "
            f"{_allowed(known, shape)}; no format holds another arrangement: start from the "
            "original model"
        )
    return Label(known[geometry], geometry, size)


def _geometry(
    shape: tuple[int, int], scale_shape: tuple[int, ...]
) -> tuple[Arrangement | None, int | None]:
    n, k = shape
    if math.prod(scale_shape) == 1:
        return TENSOR, None
    if scale_shape in ((n,), (n, 1), (n, 1, 1)):
        return ROW, None
    if len(scale_shape) == 3 and scale_shape[0] == n and scale_shape[2] == 1:
        scale_shape = scale_shape[:2]
    if len(scale_shape) != 2 or not all(scale_shape) or n % scale_shape[0] or k % scale_shape[1]:
        return None, None
    height, width = n // scale_shape[0], k // scale_shape[1]
    if height == 1 and width > 1:
        return GROUP, width
    if height == width > 1:
        return (TILE, height)
    return (None, None)


def _allowed(known: dict[Arrangement, str], shape: tuple[int, int]) -> str:
    n, k = shape
    if ROW not in known:
        return "one number"
    return f"one number, ({n},), ({n}, {k}/b) or ({n}/b, {k}/b) for blocks of b"
