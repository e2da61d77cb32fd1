"""NVFP4: q = e2m1(w / (ts * bs)); ts is one float32 per tensor, bs one e4m3fn per 16 weights along
K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from .codebook4 import E2M1
from .grids import ScaledGrid
from .levels import E4M3, Levels
from .scales import E4M3_SCALE_STEP, Geometry, chosen_e4m3, rescaled_e4m3, scale_from_absmax

BLOCK = 16
BLOCKS = Geometry(1, BLOCK)


class Nvfp4Scale(NamedTuple):
    """w ~ value(code) * (per_tensor * block): per_tensor () float32, block (N, K/16)
    float8_e4m3fn.
    """

    per_tensor: torch.Tensor
    block: torch.Tensor

    def total(self) -> torch.Tensor:
        """per_tensor * block, rounded to float32; 0 where every weight of the block rounds to
        zero.
        """
        return self.per_tensor * self.block.float()


@dataclass(frozen=True)
class Nvfp4Grid(ScaledGrid):
    """K is a multiple of 16. A zero tensor has per_tensor 1.0 and otherwise only zero bytes."""

    levels: Levels = E2M1
    geometry: Geometry = BLOCKS
    scale_step: ClassVar[float] = E4M3_SCALE_STEP

    def multiplier(self, scale: Nvfp4Scale) -> torch.Tensor:
        return scale.total()

    def scale(self, weight: torch.Tensor) -> Nvfp4Scale:
        absmax = BLOCKS.absmax(weight)
        per_tensor = scale_from_absmax(absmax.amax(), E4M3.qmax * E2M1.qmax)
        # 0-d divisors on the same device: CUDA multiplies by the reciprocal of a Python scalar, one
        # ulp off.
        block = (
            absmax / torch.tensor(E2M1.qmax, dtype=torch.float32, device=absmax.device) / per_tensor
        )
        return Nvfp4Scale(per_tensor, block.clamp_(max=E4M3.qmax).to(torch.float8_e4m3fn))

    def rescaled(self, scale: Nvfp4Scale, factor: float) -> Nvfp4Scale:
        """Block scales times factor as e4m3fn, at most 448; the scale of the tensor stays."""
        return scale._replace(block=rescaled_e4m3(scale.block, factor))

    def chosen(self, take: torch.Tensor, scale: Nvfp4Scale, other: Nvfp4Scale) -> Nvfp4Scale:
        return scale._replace(block=chosen_e4m3(take, scale.block, other.block))
