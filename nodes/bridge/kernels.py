"""Which kernel multiplies each quantized layer, and switching ComfyUI's full-precision product off
where it may be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import comfy.model_management
import comfy.ops
import comfy_kitchen
import torch
from comfy.model_patcher import ModelPatcher
from comfy_kitchen.tensor import QuantizedTensor

from ...quant_ops.formats import FORMATS
from ...quant_ops.layouts import multiplies_native
from .compat import weight_only_path

DECODED = "decoded, then multiplied at full precision"
OURS = "FewBits' kernel"
LOOKED_UP = "rows looked up, then decoded"


def use_kernels(patcher: ModelPatcher) -> None:
    """Let the quantized layers of a text encoder multiply as those of a MODEL do; ComfyUI decodes
    them all.

    A layer stays as it is where its file asks for full precision, or where this device or ComfyUI
    has no kernel.
    """
    # True for every CLIP; each layer that is loaded would be decoded by it
    patcher.force_cast_weights = False
    for layer in _linears(patcher.model):
        if not layer._full_precision_mm_config and _has_kernel(layer, patcher.load_device):
            layer._full_precision_mm = layer.comfy_force_cast_weights = False


def kernel_lines(module: torch.nn.Module) -> list[str]:
    """`72 layers bnb_nf4: how they are multiplied`, for a report; empty for a model that is not
    quantized.
    """
    found = Counter((layer.quant_format, _how(layer)) for layer in _quantized(module))
    return [f"{count:>5} layers  {name}: {how}" for (name, how), count in found.items()]


def _how(layer: torch.nn.Module) -> str:
    if isinstance(layer, torch.nn.Embedding):
        return LOOKED_UP
    precise = layer._full_precision_mm and not getattr(layer, "_fewbits_rounds", False)
    device = comfy.model_management.get_torch_device()
    if not precise and (_is_own(layer) or multiplies_native(layer.weight, device)):
        return OURS
    if layer._full_precision_mm:
        return DECODED
    backends = [name for name, facts in comfy_kitchen.list_backends().items() if _usable(facts)]
    return f"comfy-kitchen's kernel ({', '.join(backends)}), activations rounded too"


def _usable(facts: dict) -> bool:
    return bool(facts.get("available")) and not facts.get("disabled")


def _has_kernel(layer: torch.nn.Module, device: torch.device) -> bool:
    if _is_own(layer):
        return weight_only_path()
    # a newer ComfyUI lists what a device has no kernels for: INT8 on MPS, for example
    disabled = getattr(comfy.ops, "get_disabled_quant_formats", None)
    if disabled is not None and layer.quant_format in disabled(device):
        return False
    format = FORMATS.get(layer.quant_format)
    if format is None or format.unit is None:
        return True
    probe = getattr(comfy.model_management, f"supports_{format.unit}_compute", None)
    return device.type != "cpu" and probe is not None and bool(probe(device))


def _is_own(layer: torch.nn.Module) -> bool:
    return getattr(layer, "_fewbits_marker", None) is not None


def _quantized(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (
        part
        for part in module.modules()
        if isinstance(getattr(part, "weight", None), QuantizedTensor)
    )


def _linears(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (layer for layer in _quantized(module) if hasattr(layer, "_full_precision_mm"))
