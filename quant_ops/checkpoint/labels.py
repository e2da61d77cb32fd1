"""The label of an FP8 or INT8 layer, read off the dtype and the scale's shape (FORMATS 5.3); never
off user text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import CheckpointError
from ..spec import FormatOptions

# dtype of the codes -> geometry of the scales -> format
LABELS = {
    "F8_E4M3": {
        "tensor": "float8_e4m3fn",
        "row": "float8_e4m3fn_rowwise",
        "group": "float8_e4m3fn_block3d",
        "tile": "float8_e4m3fn_blockwise",
    },
    "F8_E5M2": {"tensor": "float8_e5m2"},
    "I8": {
        "tensor": "int8_tensorwise",
        "row": "int8_tensorwise",
        "group": "int8_lodewise",
        "tile": "int8_blockwise",
    },
}
# Tables that ComfyUI looks rows up in (FORMATS section 4).
EMBEDDING = re.compile(
    r"(.*\.)?(embed_tokens|shared|token_embedding|word_embeddings|wte|relative_attention_bias)"
)
# one block may be the whole layer; only a tag can say so
WHOLE_LAYER = ("float8_e4m3fn_blockwise", "int8_blockwise")


def is_bank(marker: dict, shape: tuple[int, ...]) -> bool:
    """Whether a quantized layer is a stack of experts as ComfyUI's MoEExperts stores it, and not a
    convolution.
    """
    return len(shape) == 3 and "num_experts" in marker


@dataclass(frozen=True)
class Label:
    """`geometry`: tensor, row, group (1 x size) or tile (size x size)."""

    format: str
    geometry: str
    size: int | None = None

    @property
    def options(self) -> FormatOptions:
        """As the format spells them; `resolve` refuses a block size that is read but not
        written.
        """
        return (
            FormatOptions(scaling=self.geometry)
            if self.size is None
            else FormatOptions(block_size=self.size)
        )


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
    known = LABELS.get(dtype)
    if known is None:
        raise CheckpointError(f"weight is {dtype}; a scaled weight is one of {', '.join(LABELS)}")
    n, k = shape
    if (
        math.prod(scale_shape) == 1
        and tag in WHOLE_LAYER
        and tag in known.values()
        and n == k == group_size
    ):
        return Label(tag, "tile", n)
    geometry, size = _geometry(shape, tuple(scale_shape))
    if geometry not in known:
        raise CheckpointError(
            f"weight_scale is {list(scale_shape)}, {dtype} {n}x{k} allows "
            f"{_allowed(dtype, shape)}; no format holds another arrangement: start from the "
            "original model"
        )
    return Label(known[geometry], geometry, size)


def _geometry(
    shape: tuple[int, int], scale_shape: tuple[int, ...]
) -> tuple[str | None, int | None]:
    n, k = shape
    if math.prod(scale_shape) == 1:
        return "tensor", None
    if scale_shape in ((n,), (n, 1), (n, 1, 1)):
        return "row", None
    if len(scale_shape) == 3 and scale_shape[0] == n and scale_shape[2] == 1:
        scale_shape = scale_shape[:2]
    if len(scale_shape) != 2 or not all(scale_shape) or n % scale_shape[0] or k % scale_shape[1]:
        return None, None
    height, width = n // scale_shape[0], k // scale_shape[1]
    if height == 1 and width > 1:
        return "group", width
    return ("tile", height) if height == width > 1 else (None, None)


def _allowed(dtype: str, shape: tuple[int, int]) -> str:
    n, k = shape
    if "row" not in LABELS[dtype]:
        return "one number"
    return f"one number, ({n},), ({n}, {k}/b) or ({n}/b, {k}/b) for blocks of b"
