"""MXFP8: blocks of 32 along K, q = cast(w / 2^(e - 127)) to e4m3fn, e the ceiling exponent of
absmax / 448.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .grids import ScaledGrid
from .levels import E4M3, Levels
from .scales import TINY, Geometry

BLOCK = 32
BLOCKS = Geometry(1, BLOCK)


def e8m0_ceiling(x: torch.Tensor) -> torch.Tensor:
    """The exponent byte e of the smallest power of two 2^(e-127) >= x, for finite float32 x > 0;
    uint8 in 0..254.

    From the bits: `log2` differs between devices and is wrong just above a power of two.
    """
    bits = x.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()
    return exponent.clamp_(0, 254).to(torch.uint8)


def e8m0_value(exponent: torch.Tensor) -> torch.Tensor:
    """2^(e-127) as float32; 1.0 for byte 0, which marks a zero block."""
    bits = torch.where(exponent == 0, 127, exponent.int()) << 23
    return bits.view(torch.float32)


@dataclass(frozen=True)
class Mxfp8Grid(ScaledGrid):
    """`scale` is (N, K/32) uint8, E8M0; 0 marks a zero block, whose codes are 0x00. K is a multiple
    of 32.
    """

    levels: Levels = E4M3
    geometry: Geometry = BLOCKS
    scale_step: ClassVar[float] = 1.0

    def multiplier(self, scale: torch.Tensor) -> torch.Tensor:
        """2^(e-127), exact; 0 for byte 0, as comfy-kitchen decodes it."""
        return e8m0_value(scale).masked_fill_(scale == 0, 0.0)

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        absmax = BLOCKS.absmax(weight)
        # A 0-d divisor on the same device: CUDA multiplies by the reciprocal of a Python scalar,
        # one ulp off.
        exponent = e8m0_ceiling(
            absmax / torch.tensor(E4M3.qmax, dtype=torch.float32, device=absmax.device)
        )
        return exponent.masked_fill_(absmax < TINY, 0)

    def rescaled(self, scale: torch.Tensor, factor: float) -> torch.Tensor:
        """The exponent moved by log2(factor), rounded to even, within 1..254."""
        moved = (scale.int() + round(math.log2(factor))).clamp_(1, 254)
        return moved.to(torch.uint8).masked_fill_(scale == 0, 0)
