"""CUDA C++ kernels, compiled on first use by the NVRTC that torch's CUDA builds bring: no compiler
to install.
"""

from __future__ import annotations

from functools import cache

import torch

MIN_CAPABILITY = (8, 0)  # the first with bfloat16 tensor cores


@cache
def _why_not_device(index: int) -> str | None:
    if torch.version.hip is not None:
        return "AMD GPU: our CUDA kernels are for NVIDIA"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"sm_{capability[0]}{capability[1]} is older than sm_{MIN_CAPABILITY[0]}{MIN_CAPABILITY[1]}"
    from .compiler import why_not_compile

    return why_not_compile()


def why_not_cuda(tensor: torch.Tensor) -> str | None:
    """Why our CUDA kernels do not take this tensor; None when they do."""
    if tensor.device.type != "cuda":
        return f"tensor is on {tensor.device.type}"
    if tensor.numel() == 0:
        return "tensor is empty"
    return _why_not_device(tensor.device.index or 0)
