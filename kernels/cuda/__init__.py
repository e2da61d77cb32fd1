"""CUDA C++ kernels, compiled on first use by the NVRTC that torch's CUDA builds bring: no compiler
to install.
"""

from __future__ import annotations

import torch

from .. import device

MIN_CAPABILITY = (8, 0)  # the first with bfloat16 tensor cores


def why_not_cuda(tensor: torch.Tensor) -> str | None:
    """Why our CUDA kernels do not take this tensor; None when they do."""
    reason = device.why_not(tensor, MIN_CAPABILITY, "our CUDA kernels are for NVIDIA")
    if reason or not device.gpu_of(tensor).here:
        return reason
    from .compiler import why_not_compile

    return why_not_compile()
