"""Facts about the ComfyUI at hand, as probes that return a reason; no version strings decide
anything.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from ...quant_ops.formats import get_format
from ...quant_ops.formats.base import marker_bytes
from ...quant_ops.sources import TORCH_DTYPES


def why_no_quantization() -> str | None:
    """Why ComfyUI cannot run quantized layers here, or None when it can."""
    import comfy.quant_ops as core

    if getattr(core, "_CK_AVAILABLE", False):
        return None
    try:
        kitchen = version("comfy-kitchen")
    except PackageNotFoundError:
        kitchen = "not installed"
    return (
        f"ComfyUI {core_version()} could not load comfy-kitchen (found: {kitchen}), so no "
        "quantized model can run; reinstall ComfyUI's requirements.txt"
    )


def core_version() -> str:
    """ComfyUI's own version text, for messages only."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return __version__


def weight_only_path() -> bool:
    """Whether ComfyUI itself can leave activations alone for a format (`quantize_input`, 0.27
    on).
    """
    from comfy.quant_ops import QUANT_ALGOS

    core = [
        entry
        for entry in QUANT_ALGOS.values()
        if not str(entry["comfy_tensor_layout"]).startswith("FewBits")
    ]
    return any("quantize_input" in entry for entry in core)


_EMBEDDING: dict[str, bool] = {}


def embedding_reads(format_name: str, core: type) -> bool:
    """Whether ComfyUI's own Embedding reads a format (FP8: 0.21 on, INT8: 0.29 on), found by
    loading one.

    Args:
        core: ComfyUI's Embedding class for quantized models.
    """
    from comfy_kitchen.tensor import QuantizedTensor

    if format_name not in _EMBEDDING:
        codes = TORCH_DTYPES[get_format(format_name).code_dtype]
        state = {
            "weight": torch.zeros(1, 16).to(codes),
            "weight_scale": torch.ones(()),
            "comfy_quant": torch.frombuffer(
                bytearray(marker_bytes({"format": format_name})), dtype=torch.uint8
            ),
        }
        probe = core(1, 16, device="cpu", dtype=torch.float32)
        probe.load_state_dict(state, strict=False)
        _EMBEDDING[format_name] = isinstance(probe.weight, QuantizedTensor)
    return _EMBEDDING[format_name]
