"""Grids: levels times scales. Rounding weights to codes and back in cache-sized chunks, and what
methods choose from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, Protocol, TypeAlias

import torch

from .columns import Columns, LevelColumns
from .dispatch import op
from .levels import Levels, code_values
from .memory import empty
from .scales import CHUNK_ELEMENTS, TINY, Geometry, chunk_rows, scale_from_absmax
from .triton import why_not_codes_of, why_not_double

MEASURED_ELEMENTS = 1 << 18  # per chunk of weights that are measured too: 3 MB of float32


def _row_chunks(geometry: Geometry, weight: torch.Tensor, elements: int = CHUNK_ELEMENTS) -> int:
    """Rows per chunk: a whole number of tiles."""
    step = geometry.rows or 1
    return max(chunk_rows(elements, weight.shape[1], weight.device) // step, 1) * step


def _spread(scale: torch.Tensor, geometry: Geometry, start: int, stop: int) -> torch.Tensor:
    """Scales of rows start..stop of a (rows, cols) grid, as (tile rows, 1, grid cols, 1)."""
    if geometry.rows is None:
        return scale.view(1, 1, -1, 1)
    return scale[start // geometry.rows : stop // geometry.rows, None, :, None]


def encode(
    weight: torch.Tensor, scale: torch.Tensor, levels: Levels, geometry: Geometry, seed: int = 0
) -> torch.Tensor:
    """Round a weight to codes under given scales: nearest, ties to even, clamped to +-qmax.

    Args:
        weight: (N, K) float tensor, finite.
        scale: `geometry.grid_shape` float32, finite and > 0; 1.0 for zero blocks.
        seed: other than 0, round stochastically instead: uniform dither of one step before
            rounding, so that the expected value is the weight itself. Never used for files.

    Returns:
        (N, K) codes of `levels.dtype`; zero blocks are all-zero bytes.
    """
    codes = nearest_codes(weight, scale, levels, geometry, seed)
    if levels.clear_zero_blocks:
        _clear_zero_blocks_(codes, weight, scale, geometry)
    return codes


@op
def nearest_codes(
    weight: torch.Tensor, scale: torch.Tensor, levels: Levels, geometry: Geometry, seed: int
) -> torch.Tensor:
    """`encode`, except that zero blocks keep the signs of their zeros."""
    n, k = weight.shape
    codes = empty((n, k), levels.dtype, weight.device)
    rows = _row_chunks(geometry, weight)
    scratch = torch.empty((min(rows, n), k), dtype=torch.float32, device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed) if seed else None
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        x = scratch[: stop - start].copy_(weight[start:stop])
        levels.normalise_(geometry.tiles(x), _spread(scale, geometry, start, stop))
        if seed:
            levels.dither_(x, torch.rand(x.shape, generator=generator, device=x.device).sub_(0.5))
        codes[start:stop].copy_(levels.round_(x))
    return codes


def measured_codes(
    weight: torch.Tensor,
    multiplier: torch.Tensor,
    levels: Levels,
    geometry: Geometry,
    reach: float = math.inf,
) -> tuple[torch.Tensor, Deviation]:
    """What `ScaledGrid.encode` and `deviation` give, each chunk measured while a CPU's cache holds
    it.

    Args:
        weight: (N, K) float tensor of a CPU, finite.
        multiplier: `geometry.grid_shape` float32; 0 where a tile decodes to zeros.
        reach: the largest error that a tile can have, x its multiplier; where that is below what
            was found before, no largest error is looked for.
    """
    n, k = weight.shape
    codes = empty((n, k), levels.dtype, weight.device)
    zero = multiplier == 0
    scale = torch.where(zero, 1.0, multiplier)
    band, columns = geometry.rows or 1, multiplier.shape[1]
    bands = n // band
    shape = (band, columns, k // columns)
    unit = multiplier * levels.unit  # a power of two: exact
    # of each band of tiles; all share the only one of a geometry without rows
    scales, units = (
        each.view(-1, 1, columns, 1).expand(bands, 1, columns, 1) for each in (scale, unit)
    )
    # With one scale the difference is taken in units of it, which spares a pass.
    single = unit.item() if unit.numel() == 1 and not zero.any() else None
    count = min(max(MEASURED_ELEMENTS // max(band * k, 1), 1), bands)
    scratch = torch.empty((3, count, *shape), dtype=torch.float32)
    sums = Sums()
    together = zip(
        weight.view(bands, *shape).split(count),
        codes.view(bands, *shape).split(count),
        scales.split(count),
        units.split(count),
        strict=True,
    )
    for given, part, divisor, factor in together:
        w, x, out = scratch if len(given) == count else scratch[:, : len(given)]
        levels.normalise_(w.copy_(given), divisor, x)
        rounded = levels.round_(x)
        part.copy_(rounded)
        values = levels.values(rounded, part, out)
        if single:
            sums.add(values.sub_(w, alpha=1 / single).view(-1), w.view(-1), unit=single)
            continue
        at_most = reach if reach == math.inf else reach * divisor.amax().item()
        sums.add(values.mul_(factor).sub_(w).view(-1), w.view(-1), at_most)
    if levels.clear_zero_blocks:
        _clear_zero_blocks_(codes, weight, scale, geometry)
    if zero.any():
        _blank_(codes, zero, geometry)
    return codes, sums.deviation()


def why_not_codes(weight: torch.Tensor, levels: Levels) -> str | None:
    """Why no kernel rounds this weight to these levels; None when one does."""
    if levels.kernel is None:
        return f"no kernel rounds to {levels.name}"
    return why_not_double(weight) or why_not_codes_of(weight, levels.dtype)


def _why_not_nearest_codes(
    weight: torch.Tensor, scale: torch.Tensor, levels: Levels, geometry: Geometry, seed: int
) -> str | None:
    if seed:
        return "stochastic rounding draws torch's random numbers"
    return why_not_codes(weight, levels)


@nearest_codes.backend("triton", _why_not_nearest_codes)
def _nearest_codes(weight, scale, levels, geometry, seed):
    from .triton import encode

    return encode.encode(weight, scale, levels)


@op
def nearest_tiles(
    weight: torch.Tensor, levels: Levels, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of round-to-nearest: scale = absmax / qmax of each tile, 1.0 for zero blocks;
    then `encode`.

    Backends read the weight once where a tile fits the GPU's registers or caches.
    """
    scale = scale_from_absmax(geometry.absmax(weight), levels.qmax)
    return encode(weight, scale, levels, geometry), scale


def _power_of_two(size: int, largest: int) -> bool:
    return 16 <= size <= largest and size & (size - 1) == 0


def _why_not_nearest(weight: torch.Tensor, levels: Levels, geometry: Geometry) -> str | None:
    rows, cols = geometry.rows, geometry.cols
    whole = cols is None and rows in (None, 1)
    group = rows == 1 and cols is not None and _power_of_two(cols, 4096)
    square = rows is not None and rows == cols and _power_of_two(rows, 256)
    if not (whole or group or square):
        return f"tiles of {rows} x {cols}"
    return why_not_codes(weight, levels)


@nearest_tiles.backend("triton", _why_not_nearest)
def _nearest_tiles(weight, levels, geometry):
    from .triton import quantize

    return quantize.quantize_tiles(weight, levels, geometry)


def _clear_zero_blocks_(
    codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, geometry: Geometry
) -> None:
    # a zero block has scale 1.0; most weights need no second pass to know they have none
    if not (scale == 1.0).any():
        return
    zero = geometry.absmax(weight) < TINY
    if zero.any():
        _blank_(codes, zero, geometry)


def _blank_(codes: torch.Tensor, zero: torch.Tensor, geometry: Geometry) -> None:
    """Make the bytes of some tiles all zero."""
    mask = _spread(zero, geometry, 0, len(codes))
    geometry.tiles(codes.view(torch.uint8)).masked_fill_(mask, 0)


def decode(
    codes: torch.Tensor, scale: torch.Tensor, levels: Levels, geometry: Geometry
) -> torch.Tensor:
    """(N, K) float32: each code widened exactly, times its scale, rounded to float32. NaN codes
    stay NaN.
    """
    x = levels.widen(codes)
    geometry.tiles(x).mul_(_spread(scale, geometry, 0, codes.shape[0]))
    return x


def _why_not_errors(weight: torch.Tensor, codes: torch.Tensor, *how: object) -> str | None:
    return why_not_codes_of(weight, codes.dtype)


@cache
def reach(levels: Levels) -> float:
    """The largest distance between a number from -qmax to qmax and the closest code's value, with
    room for float rounding.
    """
    count = 16 if levels.dtype == torch.uint8 else 256
    values = levels.widen(torch.arange(count, dtype=torch.uint8).view(levels.dtype))
    within = values[values.abs() <= levels.qmax].sort().values
    return 1.0001 * within.diff().amax().item() / 2


@cache
def end_codes(levels: Levels) -> tuple[int, ...]:
    """The bytes of the codes of largest magnitude."""
    count = 16 if levels.dtype == torch.uint8 else 256
    codes = torch.arange(count, dtype=torch.uint8).view(levels.dtype)
    return tuple((levels.widen(codes).abs() == levels.qmax).nonzero().view(-1).tolist())


class Deviation(NamedTuple):
    """How far decoded codes d are from their weight w, over all elements.

    The cosine between both follows exactly from `signal`, `product` and `error`; a product of d and
    w themselves would lose it to rounding.
    """

    error: float  # sum of (d - w)^2
    signal: float  # sum of w^2
    product: float  # sum of (d - w) w
    largest: float  # maximum of |d - w|


def total(
    error: torch.Tensor, signal: torch.Tensor, product: torch.Tensor, largest: torch.Tensor
) -> Deviation:
    """One Deviation of float32 parts, summed in float64, with one wait for the device."""
    sums = [part.sum(dtype=torch.float64) for part in (error, signal, product)]
    return Deviation(*torch.stack([*sums, largest.amax().double()]).tolist())


@op
def deviation(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    geometry: Geometry,
) -> Deviation:
    """The Deviation of stored codes, chunked; float32 sums within a chunk."""
    n, k = weight.shape
    rows = _row_chunks(geometry, weight)
    sums = Sums()
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        w = weight[start:stop].float().reshape(-1)
        band = geometry.band(start, stop)
        difference = decode(codes[start:stop], scale[band], levels, geometry).view(-1).sub_(w)
        sums.add(difference, w)
    return sums.deviation()


class Sums:
    """A Deviation in the making, of float32 chunks: one pass over them for each number.

    Sums are kept as Python's floats: small tensors between large chunks cost 130 MB of a CPU's
    memory, in holes no chunk fitted again.
    """

    def __init__(self) -> None:
        self._error = self._signal = self._product = self._largest = 0.0

    def add(
        self,
        difference: torch.Tensor,
        weight: torch.Tensor,
        at_most: float = math.inf,
        unit: float = 1.0,
    ) -> None:
        """Take in two flat chunks.

        Args:
            difference: in units of `unit`.
            at_most: what no |difference| is above, to float rounding.
        """
        self._error += unit**2 * torch.dot(difference, difference).item()
        self._signal += torch.dot(weight, weight).item()
        self._product += unit * torch.dot(difference, weight).item()
        if not at_most < self._largest:
            low, high = torch.aminmax(difference)
            self._largest = max(self._largest, unit * max(-low.item(), high.item()))

    def deviation(self) -> Deviation:
        return Deviation(self._error, self._signal, self._product, self._largest)


@deviation.backend("triton", _why_not_errors)
def _deviation(weight, codes, scale, levels, geometry):
    from .triton import errors

    return total(*errors.patches(weight, codes, scale, _values(levels, weight.device)))


@cache
def _values(levels: Levels, device: torch.device) -> torch.Tensor:
    """`code_values` of 4-bit codes on a device; of others one number that nothing reads."""
    if levels.dtype != torch.uint8:
        return torch.zeros(1, device=device)
    return torch.tensor(code_values(levels), device=device)


@op
def tile_errors(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    geometry: Geometry,
) -> torch.Tensor:
    """Squared error of each tile, float32, shape `grid_shape`; chunked like `encode`."""
    n, k = weight.shape
    rows = _row_chunks(geometry, weight)
    errors = torch.zeros(geometry.grid_shape((n, k)), dtype=torch.float32, device=weight.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        band = geometry.band(start, stop)
        difference = decode(codes[start:stop], scale[band], levels, geometry)
        difference.sub_(weight[start:stop].float())
        errors[band] += geometry.tiles(difference.square_()).sum((1, 3))
    return errors


@tile_errors.backend("triton", _why_not_errors)
def _tile_errors(weight, codes, scale, levels, geometry):
    from .triton import errors

    found, *_ = errors.patches(weight, codes, scale, _values(levels, weight.device))
    rows, cols = geometry.grid_shape(tuple(weight.shape))
    return found.view(rows, len(found) // rows, cols, -1).sum((1, 3))


# A grid's own description of its scales, passed on unread: one tensor, or a NamedTuple where a
# format has two levels.
Scale: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


class Grid(Protocol):
    """The representable values of one weight matrix. Formats make it, methods choose from it.

    `scale_step`: octaves between neighbouring scales that the format can store, 0 for float32
    scales. A search with finer steps than this meets the same scales again. `ends`: the bytes of
    the codes at both ends of the range. `rescaled` and `chosen` are those of one float32 tensor.
    """

    scale_step: ClassVar[float] = 0.0
    ends: tuple[int, ...]

    def scale(self, weight: torch.Tensor) -> Scale:
        """The scale that maps each region's absmax to the largest code; 1.0 for zero regions."""

    def encode(self, weight: torch.Tensor, scale: Scale, seed: int = 0) -> torch.Tensor:
        """Nearest codes under given scales, ties to even; stochastic rounding for a seed other than
        0.
        """

    def nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, Scale]:
        """(codes, scale) of round-to-nearest: `encode` under `scale`, each weight to the closest
        code, ties to even.
        """
        scale = self.scale(weight)
        return self.encode(weight, scale), scale

    def deviation(self, weight: torch.Tensor, codes: torch.Tensor, scale: Scale) -> Deviation:
        """How far stored codes are from the weight."""

    def measured(self, weight: torch.Tensor) -> tuple[torch.Tensor, Scale, Deviation]:
        """(codes, scale) of `nearest`, and their `deviation`."""
        codes, scale = self.nearest(weight)
        return codes, scale, self.deviation(weight, codes, scale)

    def decode(self, codes: torch.Tensor, scale: Scale) -> torch.Tensor:
        """(N, K) float32 value of each code."""

    def rescaled(self, scale: Scale, factor: float | torch.Tensor) -> Scale:
        """The closest scale to factor * scale that the format can store; scales that mark zero
        regions stay.
        """
        return scale * factor

    def best_factors(
        self, weight: torch.Tensor, scale: Scale, factors: tuple[float, ...]
    ) -> torch.Tensor | None:
        """One factor per region for `rescaled`, with about the smallest error; None where only
        trying tells.
        """
        return None

    def region_errors(
        self, weight: torch.Tensor, codes: torch.Tensor, scale: Scale
    ) -> torch.Tensor:
        """Squared error of each region that has a scale of its own, float32."""

    def region_sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of (N, K) float32 over each region, shaped as `region_errors`."""

    def columns(self, scale: Scale, index: torch.Tensor, shape: tuple[int, int]) -> Columns:
        """The columns with these (int64) indices, in this order, of an (N, K) weight under fixed
        scales.
        """

    def chosen(self, take: torch.Tensor, scale: Scale, other: Scale) -> Scale:
        """`scale` for the regions where `take` is true, `other` elsewhere; `take` is shaped as
        `region_errors`.
        """
        return torch.where(take, scale, other)


@dataclass(frozen=True)
class ScaledGrid(Grid):
    """Levels times one number per tile, which a subclass makes of the scale that it stores."""

    levels: Levels
    geometry: Geometry
    cuts: ClassVar[bool] = True  # whether a tile's largest code may be below its absmax

    @property
    def ends(self) -> tuple[int, ...]:
        return end_codes(self.levels)

    def multiplier(self, scale: Scale) -> torch.Tensor:
        """What codes are multiplied by, float32 of `Geometry.grid_shape`; 0 where a tile decodes
        to zeros whatever its codes.
        """
        return scale

    def encode(self, weight: torch.Tensor, scale: Scale, seed: int = 0) -> torch.Tensor:
        """(N, K) codes; all-zero bytes where the multiplier is 0."""
        number = self.multiplier(scale)
        zero = number == 0
        if not zero.any():
            return encode(weight, number, self.levels, self.geometry, seed)
        codes = encode(weight, torch.where(zero, 1.0, number), self.levels, self.geometry, seed)
        _blank_(codes, zero, self.geometry)
        return codes

    def deviation(self, weight: torch.Tensor, codes: torch.Tensor, scale: Scale) -> Deviation:
        return deviation(weight, codes, self.multiplier(scale), self.levels, self.geometry)

    def measured(self, weight: torch.Tensor) -> tuple[torch.Tensor, Scale, Deviation]:
        if weight.device.type != "cpu":
            return super().measured(weight)
        scale = self.scale(weight)
        at_most = math.inf if self.cuts else reach(self.levels)
        codes, found = measured_codes(
            weight, self.multiplier(scale), self.levels, self.geometry, at_most
        )
        return codes, scale, found

    def decode(self, codes: torch.Tensor, scale: Scale) -> torch.Tensor:
        """(N, K) float32: value(code) * multiplier, the product rounded."""
        return decode(codes, self.multiplier(scale), self.levels, self.geometry)

    def region_errors(
        self, weight: torch.Tensor, codes: torch.Tensor, scale: Scale
    ) -> torch.Tensor:
        return tile_errors(weight, codes, self.multiplier(scale), self.levels, self.geometry)

    def region_sums(self, x: torch.Tensor) -> torch.Tensor:
        return self.geometry.tiles(x).sum((1, 3))

    def columns(self, scale: Scale, index: torch.Tensor, shape: tuple[int, int]) -> Columns:
        grid, geometry = self.multiplier(scale), self.geometry
        if geometry.cols:
            of_columns = grid[:, index // geometry.cols]
        else:
            of_columns = grid.expand(-1, len(index))
        rows = geometry.rows or 1
        return LevelColumns(self.levels, of_columns.t().repeat_interleave(rows, 1).contiguous())


class TiledGrid(ScaledGrid):
    """`scale` is the 2-D grid of `Geometry.grid_shape`, float32; 1.0 for zero tiles."""

    cuts = False

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        return scale_from_absmax(self.geometry.absmax(weight), self.levels.qmax)

    def encode(self, weight: torch.Tensor, scale: torch.Tensor, seed: int = 0) -> torch.Tensor:
        return encode(weight, scale, self.levels, self.geometry, seed)

    def nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nearest_tiles(weight, self.levels, self.geometry)
