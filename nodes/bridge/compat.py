"""Facts about the ComfyUI at hand, as probes that return a reason; no version strings decide anything."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


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
        f"ComfyUI {core_version()} could not load comfy-kitchen (found: {kitchen}), so no quantized model can run; "
        "reinstall ComfyUI's requirements.txt"
    )


def core_version() -> str:
    """ComfyUI's own version text, for messages only."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return __version__


def weight_only_path() -> bool:
    """Whether ComfyUI can leave activations alone for a format (`quantize_input`, 0.27 on)."""
    from comfy.quant_ops import QUANT_ALGOS

    return any("quantize_input" in entry for entry in QUANT_ALGOS.values())
