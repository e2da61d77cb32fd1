"""Triton kernels. Triton itself is imported only by the modules in here, and those only on first
use on a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from .. import device

MIN_CAPABILITY = (7, 5)  # older GPUs have no tensor cores that Triton's dot uses; they run eager


INSTALLED = find_spec("triton") is not None


def why_not_float8(tensor: torch.Tensor) -> str | None:
    """Why this GPU cannot round to FP8 as torch does; None when it can."""
    gpu = device.gpu_of(tensor)
    return "the GPU is older than sm_89 and has no FP8" if gpu and not gpu.float8 else None


def why_not_triton(tensor: torch.Tensor) -> str | None:
    """Why our Triton kernels do not take this tensor; None when they do."""
    reason = device.why_not(tensor, MIN_CAPABILITY, "not measured yet, library matmul instead")
    if reason or INSTALLED or not device.gpu_of(tensor).here:
        return reason
    return "triton is not installed"


def why_not_codes_of(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why our Triton kernels do not take this tensor with codes of a dtype; None when they do."""
    return (why_not_float8(tensor) if dtype == torch.float8_e4m3fn else None) or why_not_triton(
        tensor
    )


def why_not_double(weight: torch.Tensor) -> str | None:
    """Why our kernels that give eager's bits do not take a weight of this dtype; None when they
    do.
    """
    return "float64 weight" if weight.dtype == torch.float64 else None
