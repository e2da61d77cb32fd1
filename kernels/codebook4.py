"""4-bit code tables: NF4 and FP4 in bitsandbytes' order, E2M1; x -> code by strict thresholds, code
-> value by table.

NF4 and FP4 group g consecutive elements of the flattened weight: absmax[b] = max |w|, x = w * (1 /
absmax).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from .columns import Columns, LevelColumns
from .dispatch import op
from .grids import (
    Deviation,
    Grid,
    decode,
    deviation,
    encode,
    end_codes,
    measured_codes,
    tile_errors,
    why_not_codes,
)
from .levels import Levels, by_division_, by_reciprocal_
from .packing import pack_nibbles
from .scales import CHUNK_ELEMENTS, Geometry, chunk_rows, scale_from_absmax

RoundFn = Callable[[torch.Tensor], torch.Tensor]

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_THRESHOLDS = (  # code = number of thresholds strictly below x
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip

# by code; bit 3 is the sign
FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
# Thresholds on |x| as float32 bits, because their decimal forms are rounded: .00260417 .0859375
# .20833333 ...
FP4_THRESHOLD_BITS = (
    0x3B2AAAB9,
    0x3DB00000,
    0x3E555555,
    0x3E955555,
    0x3ED55556,
    0x3F155550,
    0x3F555555,
)

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign
# Ties go to the even code: the largest |x| that still gets code m is the midpoint for even m, the
# float below for odd.
E2M1_THRESHOLD_BITS = (
    0x3E800000,
    0x3F3FFFFF,
    0x3FA00000,
    0x3FDFFFFF,
    0x40200000,
    0x405FFFFF,
    0x40A00000,
)


@cache
def constant(values: tuple, device: torch.device, bits: bool = False) -> torch.Tensor:
    """A small table on a device, float32, made once; `bits` means the values are float32 bit
    patterns.
    """
    table = torch.tensor(values, dtype=torch.int32 if bits else torch.float32)
    return (table.view(torch.float32) if bits else table).to(device)


def round_nf4(x: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 of x in [-1, 1], int32."""
    return torch.bucketize(x, constant(NF4_THRESHOLDS, x.device), out_int32=True)


def round_fp4(x: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 of x in [-1, 1], int32: magnitude code, plus 8 when x < 0 (-0.0 is not)."""
    rank = torch.bucketize(
        x.abs(), constant(FP4_THRESHOLD_BITS, x.device, bits=True), out_int32=True
    )
    code = rank ^ ((rank & 2) << 1)  # magnitudes in ascending order have the codes 0 1 6 7 4 5 2 3
    return code + (x < 0).int() * 8


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 of any x, int32: magnitude code, plus 8 for the sign bit; saturates at 6."""
    code = torch.bucketize(
        x.abs(), constant(E2M1_THRESHOLD_BITS, x.device, bits=True), out_int32=True
    )
    return code + x.signbit().int() * 8


@dataclass(frozen=True)
class _BitTable:
    """What a rounding function does to each of the 65536 floats-by-upper-half.

    Floats whose upper 16 bits are b get the low nibble of `codes[b]` up to the bit pattern
    `last[b]`, above it the high nibble. Needs at most one change of code per upper half, which `of`
    checks.
    """

    last: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, round_: RoundFn) -> _BitTable:
        """Find the change inside each upper half by bisection, with the rounding function as the
        only truth.
        """
        upper = torch.arange(1 << 16, dtype=torch.int64)
        upper = (upper << 16) - ((upper >> 15) << 32)  # as signed 32-bit patterns
        # infinity and NaN share an upper half: its first float decides
        finite = ((upper >> 16) & 0x7F80) != 0x7F80

        def code_at(low: torch.Tensor) -> torch.Tensor:
            return round_((upper + torch.where(finite, low, 0)).to(torch.int32).view(torch.float32))

        first, final = code_at(torch.zeros_like(upper)), code_at(torch.full_like(upper, 0xFFFF))
        # code is `first` at same, not at other
        same, other = torch.zeros_like(upper), torch.full_like(upper, 0xFFFF)
        for _ in range(16):
            middle = (same + other) // 2
            unchanged = code_at(middle) == first
            same, other = (
                torch.where(unchanged, middle, same),
                torch.where(unchanged, other, middle),
            )
        changes = first != final
        if (code_at(other)[changes] != final[changes]).any():
            raise ValueError("a rounding function changes twice within floats of equal upper half")
        last = torch.where(changes, upper + same, upper + 0xFFFF)
        return cls(last.to(torch.int32), (first | final << 4).to(torch.uint8))


@cache
def _bit_table(round_: RoundFn) -> _BitTable:
    return _BitTable.of(round_)


def fast_codes(x: torch.Tensor, round_: RoundFn) -> torch.Tensor:
    """`round_(x)` as uint8; on the CPU by table: 2 ns per element on one core where bucketize takes
    20.

    Args:
        x: contiguous float32, finite.
        round_: one of the rounding functions of this package; the table is made from it on first
            use.
    """
    if x.device.type != "cpu":
        return round_(x).to(torch.uint8)
    table = _bit_table(round_)
    bits = x.view(-1).view(torch.int32)
    index = (bits >> 16).bitwise_and_(0xFFFF)
    above = (bits > torch.index_select(table.last, 0, index)).view(torch.uint8)
    codes = torch.index_select(table.codes, 0, index)
    return codes.bitwise_right_shift_(above.bitwise_left_shift_(2)).bitwise_and_(15).view(x.shape)


@cache
def _pair_table(values: tuple[float, ...]) -> torch.Tensor:
    """The values of two codes as one complex number, at index first | second << 8; CPU only."""
    table, index = constant(values, torch.device("cpu")), torch.arange(1 << 12)
    return torch.complex(table[index & 15], table[index >> 8])


def look_up(codes: torch.Tensor, values: tuple[float, ...] | torch.Tensor) -> torch.Tensor:
    """float32 value of each code 0..15, from a fixed table or from a (16,) tensor.

    On the CPU two codes at a time: 0.5 ns per code on one core where single ones take 1.1 to 2.7.
    """
    flat = codes.reshape(-1)
    if isinstance(values, torch.Tensor):
        return torch.index_select(values, 0, flat.int()).view(codes.shape)
    if (
        codes.device.type != "cpu"
        or codes.itemsize != 1
        or flat.numel() % 2
        or flat.storage_offset() % 2
    ):
        return torch.index_select(constant(values, codes.device), 0, flat.int()).view(codes.shape)
    pairs = torch.index_select(_pair_table(values), 0, flat.view(torch.int16).int())
    return torch.view_as_real(pairs).view(codes.shape)


def dither_between_(
    x: torch.Tensor, offset: torch.Tensor, values: tuple[float, ...]
) -> torch.Tensor:
    """Move x by `offset` times the gap of the values around it, but not past them: the gaps are
    uneven.
    """
    ascending = constant(tuple(sorted(set(values))), x.device)
    index = torch.bucketize(x, ascending, right=True).clamp_(1, len(ascending) - 1)
    lower, upper = ascending[index - 1], ascending[index]
    return x.add_(offset.mul_(upper - lower)).clamp_(lower, upper)


def _signed(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    return (*magnitudes, *(-value for value in magnitudes))


def _levels(
    name: str,
    values: tuple[float, ...],
    normalise_: Callable,
    round_: RoundFn,
    clear_zero_blocks: bool = False,
    kernel: tuple[float, ...] | None = None,
) -> Levels:
    return Levels(
        name=name,
        dtype=torch.uint8,
        qmax=max(values),
        normalise_=normalise_,
        round_=lambda x: fast_codes(x, round_),
        widen=lambda codes: look_up(codes, values),
        values=lambda rounded, codes, out: look_up(codes, values),
        dither_=lambda x, offset: dither_between_(x, offset, values),
        clear_zero_blocks=clear_zero_blocks,
        kernel=kernel,
    )


def _floats(bits: tuple[int, ...]) -> tuple[float, ...]:
    return struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}I", *bits))


NF4 = _levels("nf4", NF4_VALUES, by_reciprocal_, round_nf4, kernel=NF4_THRESHOLDS)
FP4 = _levels(
    "fp4", _signed(FP4_MAGNITUDES), by_reciprocal_, round_fp4, True, _floats(FP4_THRESHOLD_BITS)
)
E2M1 = _levels("e2m1", _signed(E2M1_MAGNITUDES), by_division_, round_e2m1)


ROWS = Geometry(1, None)
BINS = 2048  # weights whose errors are known for each factor on a scale


@cache
def _errors_by_factor(
    levels: Levels, factors: tuple[float, ...], count: int, device: torch.device
) -> torch.Tensor:
    """(BINS, factors) squared errors of weights from -1 to 1 x absmax, in float32 integers.

    Errors are below 1; in units of count / 2^24 a sum over `count` of them is exact, and so the
    same in any order.
    """
    x = torch.arange(BINS, dtype=torch.float64).mul_(2 / (BINS - 1)).sub_(1).mul_(levels.qmax)
    columns = []
    for factor in factors:
        value = levels.widen(levels.round_((x / factor).float())).double() * factor
        columns.append(((x - value) / levels.qmax).square_().mul_(2**24 / count).round_().float())
    return torch.stack(columns, 1).to(device)


@op
def lowest_error(
    x: torch.Tensor, scale: torch.Tensor, levels: Levels, table: torch.Tensor
) -> torch.Tensor:
    """Which factor has the smallest error in each group: the sum over its weights of the rows of a
    table.

    Args:
        x: (n, count) float groups of a weight.
        scale: (n, 1) float32.
        table: (bins, F) float32 integers, for x from -scale to scale; a sum over `count` is below
            2^24.

    Returns:
        (n,) int32, the first of equal ones.
    """
    bins, factors = table.shape
    order = torch.arange(factors, dtype=torch.float32, device=x.device)
    rows = chunk_rows(CHUNK_ELEMENTS // 8, x.shape[1], x.device)  # 2 MB of sums with groups of 64
    best = torch.empty(len(x), dtype=torch.int32, device=x.device)
    for out, part, divisor in zip(best.split(rows), x.split(rows), scale.split(rows), strict=True):
        at = levels.normalise_(part.to(torch.float32, copy=True), divisor).div_(levels.qmax)
        at = at.add_(1.0).mul_((bins - 1) / 2).round_().clamp_(0, bins - 1).int()
        sums = _sum_rows(table, at)
        lowest = sums.amin(1, keepdim=True)  # of equal ones argmin takes any
        out.copy_(torch.where(sums == lowest, order, factors).amin(1))
    return best


def _why_not_lowest_error(
    x: torch.Tensor, scale: torch.Tensor, levels: Levels, table: torch.Tensor
) -> str | None:
    if levels.qmax != 1:
        return f"{levels.name} goes to {levels.qmax:g}"
    return why_not_codes(x, levels)


@lowest_error.backend("triton", _why_not_lowest_error)
def _lowest_error(x, scale, levels, table):
    from .triton import search

    return search.lowest_error(x, scale, table)


def _sum_rows(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(rows, F) and (n, count) int32 -> (n, F): the sum of the `count` rows that each row of the
    index names.
    """
    # other devices have this only in some versions of torch
    if index.device.type in ("cpu", "cuda"):
        return torch.nn.functional.embedding_bag(index, table, mode="sum")
    return table[index].sum(1)


@dataclass(frozen=True)
class FlatGrid(Grid):
    """Levels with one scale per `group_size` consecutive elements of the flattened weight; the last
    may be shorter.

    `scale` is (ceil(N * K / group_size),) float32: absmax, 1.0 for zero blocks.
    """

    levels: Levels
    group_size: int

    @property
    def ends(self) -> tuple[int, ...]:
        return end_codes(self.levels)

    def _runs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The flattened matrix as (blocks, group_size), then what is left as (1, rest); views of
        x.
        """
        flat = x.reshape(-1)
        whole = flat.numel() // self.group_size * self.group_size
        blocks, rest = flat[:whole].view(-1, self.group_size), flat[whole:].view(1, -1)
        return [run for run in (blocks, rest) if run.numel()] or [blocks]

    def _scales(self, scale: torch.Tensor, runs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(scale.view(-1, 1).split(list(map(len, runs))))

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        absmax = _joined([ROWS.absmax(run) for run in self._runs(weight)])
        return scale_from_absmax(absmax, self.levels.qmax)

    def encode(self, weight: torch.Tensor, scale: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """(N, K) uint8 codes; in a zero block the code that decodes to +0."""
        runs = self._runs(weight)
        pairs = zip(runs, self._scales(scale, runs), strict=True)
        parts = [encode(run, part, self.levels, ROWS, seed) for run, part in pairs]
        return _joined(parts).view(weight.shape)

    def nearest(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nearest_flat4(weight, self.levels, self.group_size, False)

    def deviation(
        self, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> Deviation:
        runs = self._runs(weight)
        found = [
            deviation(run, part, scales, self.levels, ROWS)
            for run, part, scales in zip(
                runs, self._runs(codes), self._scales(scale, runs), strict=True
            )
        ]
        return _together(found)

    def measured(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Deviation]:
        if weight.device.type != "cpu":
            return super().measured(weight)
        scale, runs = self.scale(weight), self._runs(weight)
        pairs = zip(runs, self._scales(scale, runs), strict=True)
        codes, found = zip(
            *(measured_codes(run, part, self.levels, ROWS) for run, part in pairs), strict=True
        )
        return _joined(codes).view(weight.shape), scale, _together(found)

    def decode(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(N, K) float32: table[code] * scale[flat index // group_size], the product rounded."""
        runs = self._runs(codes)
        pairs = zip(runs, self._scales(scale, runs), strict=True)
        parts = [decode(run, part, self.levels, ROWS) for run, part in pairs]
        return _joined(parts).view(codes.shape)

    def best_factors(
        self, weight: torch.Tensor, scale: torch.Tensor, factors: tuple[float, ...]
    ) -> torch.Tensor:
        """By the errors that BINS weights between -absmax and absmax would have; ties go to the
        first factor.

        Nanoseconds per weight on one core for 88 factors: 8, where encoding and measuring 50 of
        them took 300; squared error of normal weights as NF4 .8546 of nearest's, before .8549 (1024
        bins .8547).
        """
        chosen = torch.tensor(factors, dtype=torch.float32, device=weight.device)
        runs = self._runs(weight)
        parts = []
        for run, part in zip(runs, self._scales(scale, runs), strict=True):
            table = _errors_by_factor(self.levels, factors, run.shape[1], weight.device)
            parts.append(chosen[lowest_error(run, part, self.levels, table)])
        return _joined(parts)

    def region_errors(
        self, weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        runs = self._runs(weight)
        parts = zip(runs, self._runs(codes), self._scales(scale, runs), strict=True)
        return _joined(
            [tile_errors(run, part, scales, self.levels, ROWS) for run, part, scales in parts]
        )

    def region_sums(self, x: torch.Tensor) -> torch.Tensor:
        return _joined([run.sum(1) for run in self._runs(x)])

    def columns(self, scale: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> Columns:
        n, k = shape
        rows = torch.arange(n, device=index.device) * k
        group = (index[:, None] + rows).div(self.group_size, rounding_mode="floor")
        return LevelColumns(self.levels, scale[group])


def _together(found: Iterable[Deviation]) -> Deviation:
    """The Deviation of a weight from those of its parts."""
    errors, signals, products, largest = zip(*found, strict=True)
    return Deviation(sum(errors), sum(signals), sum(products), max(largest))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0].view(-1)
    return torch.cat([part.view(-1) for part in parts])


@op
def nearest_flat4(
    weight: torch.Tensor, levels: Levels, group_size: int, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, absmax) of round-to-nearest on a `FlatGrid`: (N, K), or `packed` (N, K/2) with the
    high nibble first.

    Backends read the weight once and pack in registers.
    """
    grid = FlatGrid(levels, group_size)
    scale = grid.scale(weight)
    codes = grid.encode(weight, scale)
    return (pack_nibbles(codes, high_first=True) if packed else codes), scale


@nearest_flat4.backend(
    "triton", lambda weight, levels, group_size, packed: why_not_codes(weight, levels)
)
def _nearest_flat4(weight, levels, group_size, packed):
    from .triton import quantize

    return quantize.quantize_groups(weight, levels, group_size, packed)
