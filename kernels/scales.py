"""Scale geometry: which elements of a weight share one scale, and what that scale is (scale =
absmax / qmax).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .dispatch import op
from .levels import E4M3_MAX
from .triton import why_not_triton

TINY = 2.0**-80  # a region whose absmax is below this is a zero block: docs/formats.md#numbers
CHUNK_ELEMENTS = 1 << 20
# Elements per chunk of the encoders: scratch of 4 MB float32. Measured on two CPU cores (torch
# 2.11, AVX-512), GB/s of bf16 read, float8_e4m3fn: 2.5 at 2^16, 2.8 at 2^17, 3.5 at 2^18, 4.6 at
# 2^20; whole tensor at once 0.45.

# Elements of a row from which its largest magnitude is found by the bits: ns per bf16 element on
# one busy core, of widened floats against that: 64 0.64 and 1.28, 512 0.55 and 0.53, 3072 0.61 and
# 0.25.
LONG = 1024
BITS = {  # dtype -> integers of its width, with a sign and without
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
    torch.float32: (torch.int32, np.uint32),
}


def chunk_rows(elements: int, columns: int, device: torch.device) -> int:
    """Rows per chunk of about `elements` elements; 16 times as many on a GPU, where small chunks
    wait for launches.
    """
    return max((elements if device.type == "cpu" else 16 * elements) // max(columns, 1), 1)


@dataclass(frozen=True)
class Geometry:
    """Tiles of `rows` x `cols` elements share a scale; None means the whole extent.

    Examples for a weight (N, K):
    * Geometry(None, None) -> one scale, grid (1, 1)
    * Geometry(1, None)    -> one scale per row, grid (N, 1)
    * Geometry(64, 64)     -> grid (N/64, K/64)
    * Geometry(1, 64)      -> grid (N, K/64)
    """

    rows: int | None
    cols: int | None

    def grid_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        n, k = shape
        return (1 if self.rows is None else n // self.rows), (
            1 if self.cols is None else k // self.cols
        )

    def band(self, start: int, stop: int) -> slice:
        """The rows of the grid whose tiles hold these rows of the weight; whole tiles."""
        if self.rows is None:
            return slice(None)
        return slice(start // self.rows, stop // self.rows)

    def tiles(self, x: torch.Tensor) -> torch.Tensor:
        """View (N, K) as (grid rows, rows, grid cols, cols). Sizes must divide."""
        n, k = x.shape
        rows, cols = self.rows or max(n, 1), self.cols or max(k, 1)
        return x.view(n // rows, rows, k // cols, cols)

    def absmax(self, weight: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each tile, float32, shape `grid_shape`; NaN if a tile holds NaN, 0
        if it is empty.
        """
        if weight.dtype == torch.float64:  # rounded to float32 once, like the codes
            weight = weight.float()
        grid = self.grid_shape(tuple(weight.shape))
        if weight.numel() == 0:
            return torch.zeros(grid, dtype=torch.float32, device=weight.device)
        return tile_absmax(weight, self)


@op
def tile_absmax(weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`Geometry.absmax` of a weight that is not empty and not float64."""
    grid, weight = geometry.grid_shape(tuple(weight.shape)), weight.contiguous()
    if geometry.rows is None and geometry.cols is None:
        low, high = torch.aminmax(weight)
    elif geometry.rows == 1 and weight.device.type == "cpu":
        return _run_absmax(geometry.tiles(weight).view(grid[0] * grid[1], -1)).view(grid)
    else:
        tiles = geometry.tiles(weight)
        # Two reductions: aminmax(dim=...) ran at 1.4 GB/s where amax + amin ran at 8.8 (two CPU
        # cores, bf16).
        high, low = tiles.amax((1, 3)), tiles.amin((1, 3))
    return torch.maximum(high.float(), -low.float()).reshape(grid)


def _why_not_absmax(weight: torch.Tensor, geometry: Geometry) -> str | None:
    if geometry.rows not in (None, 1) and (
        geometry.rows & (geometry.rows - 1) or geometry.rows != geometry.cols
    ):
        return f"tiles of {geometry.rows} x {geometry.cols}"
    return why_not_triton(weight)


@tile_absmax.backend("triton", _why_not_absmax)
def _tile_absmax(weight, geometry):
    from .triton import encode

    return encode.absmax(weight, geometry.rows, geometry.cols)


def _run_absmax(runs: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of (M, g), float32, in cache-sized chunks.

    Widening first is what pays: ns per bf16 element on one CPU core (torch 2.11), amax + amin of
    the stored dtype against this: g = 16 3.5 and 1.3, 64 1.27 and 0.35, 4096 0.43 and 0.26.
    """
    count, size = runs.shape
    if size >= LONG and runs.dtype in BITS:
        return _long_run_absmax(runs)
    absmax = torch.empty(count, dtype=torch.float32, device=runs.device)
    step = max(CHUNK_ELEMENTS // size, 1)
    scratch = torch.empty((min(step, count), size), dtype=torch.float32, device=runs.device)
    for start in range(0, count, step):
        part = absmax[start : start + step]
        torch.amax(scratch[: len(part)].copy_(runs[start : start + step]).abs_(), 1, out=part)
    return absmax


def _long_run_absmax(runs: torch.Tensor) -> torch.Tensor:
    """`_run_absmax` by the bits: magnitudes of floats, NaN above all, are ordered as their bits."""
    signed, unsigned = BITS[runs.dtype]
    absmax = torch.empty(len(runs), dtype=signed)
    step = max(CHUNK_ELEMENTS // 4 // runs.shape[1], 1)
    for part, out in zip(runs.view(signed).split(step), absmax.split(step), strict=True):
        bits = part.numpy()
        # a negative float is above all others when its bits are read without a sign
        negative = bits.view(unsigned).max(1) & np.iinfo(bits.dtype).max
        np.maximum(bits.max(1), negative.astype(bits.dtype), out=out.numpy())
    return absmax.view(runs.dtype).float()


def scale_from_absmax(absmax: torch.Tensor, qmax: float) -> torch.Tensor:
    """absmax / qmax in float32, correctly rounded; 1.0 for zero blocks, so that they decode to
    exact zeros.
    """
    # A 0-d divisor on the same device: CUDA multiplies by the reciprocal of a Python scalar, one
    # ulp off.
    divisor = torch.full((), qmax, dtype=torch.float32, device=absmax.device)
    return torch.where(absmax < TINY, torch.ones_like(absmax), absmax / divisor)


E4M3_SCALE_STEP = 0.125  # e4m3fn has eight values per octave


def rescaled_e4m3(scale: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * scale for scales stored as e4m3fn, rounded to even, at most 448."""
    return scale.float().mul_(factor).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)


def chosen_e4m3(take: torch.Tensor, scale: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`torch.where` for e4m3fn, by its bytes: torch has none for float8."""
    return torch.where(take, scale.view(torch.uint8), other.view(torch.uint8)).view(
        torch.float8_e4m3fn
    )
