"""Mistakes that show beside the original: how far a layer is from it, and what explains that."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ....kernels.hadamard import rotate
from ...formats import FORMATS, Format
from ...formats.bnb_4bit import Bnb4Bit
from ..importers import Translation
from ..importers.base import Tensors
from ..importers.four_bit import swap_nibbles
from .findings import ORIGINAL, Finding, Mistake
from .values import NIBBLES_SWAPPED

WRONG = 0.5  # rel_l2 above this is another weight: 4-bit codes reach 0.13, swapped nibbles 1.3
TRUNCATED_STEPS = 0.25  # mean of |w / scale| - |q|: 0 when rounded, 0.5 when truncated

TRUNCATED = Mistake("truncated", "INT8 codes are truncated instead of rounded", ORIGINAL)
BLOCKS_CLIPPED = Mistake(
    "blocks-clipped", "block exponents are rounded down: block maxima are clipped", ORIGINAL
)
BLOCK_SCALES = Mistake(
    "block-scales-misplaced", "block scales are not in ComfyUI's order or padding", ORIGINAL
)
ROTATION_UNSAID = Mistake(
    "rotation-unsaid", "the codes are rotated, the JSON does not say so", ORIGINAL
)
FAR = Mistake("far-from-original", "the weights are far from the original's", ORIGINAL)

COMPARED = (TRUNCATED, BLOCKS_CLIPPED, BLOCK_SCALES, ROTATION_UNSAID, FAR)


@dataclass(frozen=True)
class Pair:
    """One layer in canonical form beside its original (N, K) float32."""

    name: str
    made: Translation
    canonical: Tensors
    original: torch.Tensor

    @property
    def format(self) -> Format | None:
        return FORMATS.get(self.made.format)

    def error_of(self, weight: torch.Tensor) -> float:
        """||weight - original|| / ||original||."""
        norm = float(self.original.norm())
        difference = float((weight - self.original).norm())
        if norm:
            return difference / norm
        return difference


def compare(pair: Pair) -> tuple[float, list[Finding]]:
    """(rel_l2, what is wrong with the layer)."""
    decoded = pair.made.weight(pair.canonical)
    if decoded.shape != pair.original.shape:
        what = f"shape {list(decoded.shape)}, the original has {list(pair.original.shape)}"
        return math.inf, [FAR.at(pair.name, what)]
    error = pair.error_of(decoded)
    if not error < WRONG:
        return error, [_explained(pair, decoded, error)]
    return error, [*_truncation(pair, decoded), *_clipping(pair)]


def _explained(pair: Pair, decoded: torch.Tensor, error: float) -> Finding:
    """Which known mistake a wrong weight comes from: the reading that brings it close to the
    original.
    """
    if isinstance(pair.format, Bnb4Bit):
        swapped = {**pair.canonical, "weight": swap_nibbles(pair.canonical["weight"])}
        other = pair.error_of(pair.made.weight(swapped))
        if other < WRONG:
            what = f"rel_l2 {error:.2f}, with the nibbles swapped {other:.2f}"
            return NIBBLES_SWAPPED.at(pair.name, what)
    for group in (16, 64, 256):
        if decoded.dim() == 2 and decoded.shape[1] % group == 0:
            other = pair.error_of(rotate(decoded, group))
            if other < WRONG:
                what = f"rel_l2 {error:.2f}, un-rotated in groups of {group} {other:.2f}"
                return ROTATION_UNSAID.at(pair.name, what)
    mistake = FAR
    if pair.format and pair.format.swizzled:
        mistake = BLOCK_SCALES
    return mistake.at(pair.name, f"rel_l2 {error:.2f}")


def _truncation(pair: Pair, decoded: torch.Tensor) -> list[Finding]:
    format = pair.format
    if format is None or format.unused_code is None or format.rotation(pair.made.options):
        return []
    bias = _steps_lost(pair.canonical["weight"], decoded, pair.original)
    if bias <= TRUNCATED_STEPS:
        return []
    return [TRUNCATED.at(pair.name, f"codes are {bias:.2f} steps too small on average")]


def _steps_lost(codes: torch.Tensor, decoded: torch.Tensor, weight: torch.Tensor) -> float:
    """Mean of |w / scale| - |q| over codes that are neither zero nor clamped; the scale is decoded
    / q.
    """
    q = codes.float()
    inner = (q != 0) & (q.abs() < 127)
    if not inner.any():
        return 0.0
    scale = decoded[inner] / q[inner]
    return float(((weight[inner] / scale).abs() - q[inner].abs()).mean())


def _clipping(pair: Pair) -> list[Finding]:
    clipped = pair.format and pair.format.overflowing(pair.canonical, pair.original)
    if clipped:
        return [BLOCKS_CLIPPED.at(pair.name, f"{clipped} blocks")]
    return []
