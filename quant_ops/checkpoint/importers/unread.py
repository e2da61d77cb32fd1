"""Codes of tools whose files are not read, told by the names they use; a table, for messages."""

from __future__ import annotations

import re
from collections.abc import Container

from ...spec import FLOAT_DTYPES, TensorSpec

# End of a tensor's name, and what must stand beside it under the same base ("" for nothing) -> who
# stores codes so. Such a tensor may have any type: HQQ can store its codes as F16.
TOOLS = {
    ("._weight_qdata", ""): "torchao",
    (".weight_qdata", ""): "torchao",
    (".W_q", ""): "HQQ",
    (".q_weight", ".q_scale"): "ExLlamaV2",
    (".trellis", ""): "ExLlamaV3",
    (".Qidxs", ""): "QuIP#",
    (".codes", ".codebooks"): "AQLM",
    (".compressed", ".bitmask"): "compressed-tensors, sparse",
    ("_blocks", "_scales"): "MXFP4 of gpt-oss",
    (".B", ".s"): "Marlin",
}
# Of these, codes are stored as floats too.
AS_FLOATS = ("torchao", "HQQ")
# Names of what belongs to codes: beside a weight of codes, such a tensor changes what they mean.
COMPANION = re.compile(
    r"(?i)scale(?!_shift)|zero|quant|codebook|absmax|outlier|offset|g_idx|bitmask|smooth|lora_|svd_"
    r"|(^|_)(zp|lut|scb|s|min|max|shift|delta)$"
)


def tool_of(spec: TensorSpec, names: Container[str]) -> str | None:
    """The tool whose codes a tensor holds, by its name and its neighbours; None for any other."""
    for (ending, beside), tool in TOOLS.items():
        if not spec.name.endswith(ending) or len(spec.shape) < 2:
            continue
        neighbour = spec.name.removesuffix(ending) + beside
        if spec.dtype in FLOAT_DTYPES and tool not in AS_FLOATS:
            continue
        if not beside or neighbour in names:
            return tool
    return None


def is_companion(suffix: str) -> bool:
    """Whether a tensor of this name beside codes changes what they mean."""
    return COMPANION.search(suffix) is not None
