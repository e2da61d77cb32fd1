"""Triton kernels. Triton itself is imported only by the modules in here, and those only on first
use on a GPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

MIN_CAPABILITY = (7, 5)  # older GPUs have no tensor cores that Triton's dot uses; they run eager


@cache
def _why_not_device(index: int) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "AMD GPU: not measured yet, library matmul instead"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"sm_{capability[0]}{capability[1]} is older than sm_{MIN_CAPABILITY[0]}{MIN_CAPABILITY[1]}"
    return None


def why_not_float8(tensor: torch.Tensor) -> str | None:
    """Why this GPU cannot round to FP8 as torch does; None when it can."""
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) < (8, 9):
        return "the GPU is older than sm_89 and has no FP8"
    return None


def why_not_triton(tensor: torch.Tensor) -> str | None:
    """Why our Triton kernels do not take this tensor; None when they do."""
    if tensor.device.type != "cuda":
        return f"tensor is on {tensor.device.type}"
    if tensor.numel() == 0:
        return "tensor is empty"
    return _why_not_device(tensor.device.index or 0)


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
