"""MXFP8: blocks of 32 along K, q = cast(w / 2^(e - 127)) to e4m3fn, e the ceiling exponent of
absmax / 448.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .columns import Columns
from .grids import E4M3, Grid, decode, encode, level_columns, squared_error, tile_errors
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
class Mxfp8Grid(Grid):
    """`scale` is (N, K/32) uint8, E8M0; 0 marks a zero block, whose codes are 0x00. K is a multiple
    of 32.
    """

    scale_step: ClassVar[float] = 1.0

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        absmax = BLOCKS.absmax(weight)
        # A 0-d divisor on the same device: CUDA multiplies by the reciprocal of a Python scalar,
        # one ulp off.
        exponent = e8m0_ceiling(
            absmax / torch.tensor(E4M3.qmax, dtype=torch.float32, device=absmax.device)
        )
        return exponent.masked_fill_(absmax < TINY, 0)

    def encode(self, weight: torch.Tensor, scale: torch.Tensor, seed: int = 0) -> torch.Tensor:
        return encode(weight, e8m0_value(scale), E4M3, BLOCKS, seed)

    def squared_error(
        self, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> tuple[float, float]:
        return squared_error(weight, codes, e8m0_value(scale), E4M3, BLOCKS)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(N, K) float32: code * 2^(e-127), exact; 0 in blocks with byte 0, as comfy-kitchen
        decodes them.
        """
        return decode(codes, e8m0_value(scale).masked_fill_(scale == 0, 0.0), E4M3, BLOCKS)

    def rescaled(self, scale: torch.Tensor, factor: float) -> torch.Tensor:
        """The exponent moved by log2(factor), rounded to even, within 1..254."""
        moved = (scale.int() + round(math.log2(factor))).clamp_(1, 254)
        return moved.to(torch.uint8).masked_fill_(scale == 0, 0)

    def region_errors(
        self, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        return tile_errors(weight, codes, e8m0_value(scale), E4M3, BLOCKS)

    def region_sums(self, x: torch.Tensor) -> torch.Tensor:
        return BLOCKS.tiles(x).sum((1, 3))

    def columns(self, scale: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> Columns:
        value = e8m0_value(scale).masked_fill_(scale == 0, 0.0)
        return level_columns(E4M3, BLOCKS, value, index)

    def chosen(self, take: torch.Tensor, scale: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(take, scale, other)
