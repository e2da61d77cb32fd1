"""Image similarity by piq: SSIM and PSNR of a picture against the reference picture."""

from __future__ import annotations

import piq
import torch


def as_tensor(image: object) -> torch.Tensor:
    """PIL image -> (1, 3, H, W) float32 in [0, 1]."""
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(1, height, width, 3).permute(0, 3, 1, 2).float() / 255


def ssim(image: object, reference: object) -> float:
    return float(piq.ssim(as_tensor(image), as_tensor(reference), data_range=1.0))


def psnr(image: object, reference: object) -> float | None:
    """Decibels; None when the pictures are equal."""
    a, b = as_tensor(image), as_tensor(reference)
    return None if torch.equal(a, b) else float(piq.psnr(a, b, data_range=1.0))
