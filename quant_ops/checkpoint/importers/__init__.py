"""Foreign dialects: one file per family of them, whose docstring is the mapping table; tried in
this order per layer.

A new dialect is a new file and one line in DIALECTS.
"""

from __future__ import annotations

from ...errors import CheckpointError
from ...spec import FLOAT_DTYPES
from .asym_w4a8 import AsymW4A8
from .base import Dialect, ImportOptions, StoredLayer, Translation
from .bitsandbytes import BitsAndBytes
from .comfy_quant import ComfyQuant
from .comfyui_layers import ComfyuiLayers
from .compressed_tensors import CompressedTensors
from .flat_4bit import Flat4Bit
from .gptq import Gptq
from .hybrid_mxfp8 import HybridMxfp8
from .legacy_4bit import BytesWithScales, StateWithoutWeight
from .legacy_int8 import Int8Fast, Int8WithoutJson, LegacyInt8
from .llm_int8 import LlmInt8
from .packed_int4 import PackedInt4
from .plain import BlocksWithoutJson, DummyScale, OrphanMarker, PlainFp8
from .quanto import Quanto, QuantoBits
from .scale_inv import Fp8ScaleInv
from .scaled_fp8 import ScaledFp8
from .svdquant import SvdQuant
from .tinychat import TinyChat

# The order of evidence: what a file says about a layer before what its dtypes suggest.
DIALECTS: tuple[Dialect, ...] = (
    SvdQuant(),
    TinyChat(),
    Gptq(),
    PackedInt4(),
    Quanto(),
    QuantoBits(),
    CompressedTensors(),
    Fp8ScaleInv(),
    ComfyuiLayers(),
    OrphanMarker(),
    HybridMxfp8(),
    AsymW4A8(),
    Flat4Bit(),
    ComfyQuant(),
    Int8Fast(),
    BitsAndBytes(),
    StateWithoutWeight(),
    LlmInt8(),
    ScaledFp8(),
    LegacyInt8(),
    Int8WithoutJson(),
    BytesWithScales(),
    PlainFp8(),
    BlocksWithoutJson(),
    DummyScale(),
)


def explained(layer: StoredLayer) -> bool:
    """Whether a layer's weight is no codes, or codes that some dialect claims."""
    if layer.weight.dtype in FLOAT_DTYPES or layer.marker is not None:
        return True
    return len(layer.weight.shape) < 2 or any(dialect.claims(layer) for dialect in DIALECTS)


def translate(layer: StoredLayer, options: ImportOptions) -> Translation | None:
    """The canonical layer by the first dialect that claims it; None for a plain tensor, or one that
    stays as it is.

    Raises:
        CheckpointError: recognised, but it cannot be read without guessing.
    """
    dialect = next((dialect for dialect in DIALECTS if dialect.claims(layer)), None)
    if dialect is not None:
        return dialect.translate(layer, options)
    if layer.unreadable and not options.foreign_only:
        raise CheckpointError(
            f"comfy_quant cannot be read ({layer.unreadable}), and the tensors alone do not tell "
            "the format; start from the original model"
        )
    return None


__all__ = [
    "DIALECTS",
    "ImportOptions",
    "StoredLayer",
    "Translation",
    "explained",
    "translate",
]
