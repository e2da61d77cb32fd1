"""The golden inputs of tests/formats/test_golden.py, and short forms for bytes and bits."""

from __future__ import annotations

import hashlib

import torch

A = torch.tensor(
    [
        [0.5, -1, 0.25, 2, -0.125, 0.75, -4, 3],
        [0.1, -0.2, 0.3, -0.4, 0.05, -0.06, 0.07, 0.08],
        [0.0] * 8,
        [7, -7, 3.5, 1.75, -1, 0.5, 127, -64],
    ]
)
_n, _k = torch.arange(4)[:, None], torch.arange(64)[None]
B = ((37 * _n + 11 * _k) % 31 - 15) / 16 * torch.tensor([1, 0.5, 3, 0.0625])[:, None]
C = (20 * torch.arange(3)[:, None] + torch.arange(20)[None] - 30) / 8
_k = torch.arange(40)
D = torch.stack([((13 * _k + 5) % 23 - 11) / 8, ((7 * _k + 3) % 19 - 9) / 32])


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sha(tensor: torch.Tensor) -> str:
    """First 16 hex digits of the SHA-256 of the raw bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()[:16]


def bits(tensor: torch.Tensor) -> str:
    """float32 values as big-endian bit patterns, separated by spaces."""
    assert tensor.dtype == torch.float32
    return " ".join(
        f"{value & 0xFFFFFFFF:08x}" for value in tensor.reshape(-1).view(torch.int32).tolist()
    )


def floats(patterns: str) -> torch.Tensor:
    """The inverse of `bits`."""
    values = [int(pattern, 16) for pattern in patterns.split()]
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32).view(
        torch.float32
    )
