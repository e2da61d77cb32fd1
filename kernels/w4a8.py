"""W4A8: 4-bit codes index a fixed table of levels; q8 = round(level * s_rel) is INT8, w ~ q8 *
s_channel (rotated w).

s_rel is one e4m3fn per 16 weights along K, s_channel one float32 per row. The table, the two
refinement passes and the choice against the stored INT8 grid are those of
comfy_kitchen/backends/eager/w4a8_int8.py (comfy-kitchen 0.2.40, Apache-2.0); sums over a group are
folded in halves, so that every device gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch

from .codebook4 import constant, fast_codes, look_up
from .columns import Columns, TableColumns
from .dispatch import op
from .grids import Deviation, Grid, Sums, total
from .hadamard import rotate
from .packing import unpack_nibbles
from .scales import (
    CHUNK_ELEMENTS,
    E4M3_SCALE_STEP,
    TINY,
    Geometry,
    chosen_e4m3,
    chunk_rows,
    rescaled_e4m3,
)
from .triton import why_not_double, why_not_triton

GROUP = 16
GROUPS = Geometry(1, GROUP)
LEVELS = (
    -0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720,
    0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671,
)  # fmt: skip
FLOOR = 1e-8  # smallest group and row scale, as in comfy-kitchen
# least-squares refinements of a group's scale; further ones gain less than 0.001 in relative error
PASSES = 2

SPANS = (16, 64, 256)  # rotation groups that files are written with, and a kernel decodes


def round_level(x: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to x, the lower one on a tie; int32. Distances are rounded to
    float32.
    """
    table = constant(LEVELS, x.device)
    above = torch.bucketize(x, table, out_int32=True)  # number of levels below x
    low, high = (above - 1).clamp_(0), above.clamp(max=len(LEVELS) - 1)
    nearer = (x - table[high]).abs_() < (x - table[low]).abs_()
    return torch.where(nearer, high, low)


def _columns(x: torch.Tensor) -> torch.Tensor:
    """(n, K) -> (16, n * K/16): each group a column, so that every step runs over long contiguous
    rows.
    """
    return x.reshape(-1, GROUP).t().contiguous()


def _fold(x: torch.Tensor) -> torch.Tensor:
    """Sum of each column of 16, always in the same order: x[i] + x[i+8], then +4, +2, +1."""
    half = GROUP // 2
    while half:
        x = x[:half] + x[half:]
        half //= 2
    return x[0]


class W4A8Scale(NamedTuple):
    """channel (N,) float32, 1.0 for a zero row; relative (N, K/16) float8_e4m3fn in INT8 steps, 0
    for a zero group.
    """

    channel: torch.Tensor
    relative: torch.Tensor


@dataclass(frozen=True)
class W4A8Grid(Grid):
    """Grid of an already rotated weight; K is a multiple of 16."""

    scale_step: ClassVar[float] = E4M3_SCALE_STEP
    ends: ClassVar[tuple[int, ...]] = (0, 15)

    def scale(self, weight: torch.Tensor) -> W4A8Scale:
        """Each group's scale by `fit_groups`; each row's such that its largest value is 127
        steps.
        """
        group_scale, largest = fit_groups(weight)
        zero = largest == 0
        # see scale_from_absmax
        divisor = torch.tensor(127.0, dtype=torch.float32, device=weight.device)
        channel = torch.where(zero.all(1), 1.0, (largest.amax(1) / divisor).clamp_(min=FLOOR))
        relative = group_scale.div_(channel[:, None]).masked_fill_(zero, 0.0)
        return W4A8Scale(channel, relative.to(torch.float8_e4m3fn))

    def encode(self, weight: torch.Tensor, scale: W4A8Scale, seed: int = 0) -> torch.Tensor:
        """(N, K) uint8 codes 0..15 of the levels whose INT8 value is nearest to w / s_channel; zero
        groups are 0.
        """
        if seed:
            return _codes(weight, *scale, torch.Generator(weight.device).manual_seed(seed))
        return nearest_w4a8(weight, *scale)

    def deviation(self, weight: torch.Tensor, codes: torch.Tensor, scale: W4A8Scale) -> Deviation:
        """Measured in the rotated basis; the rotation is orthogonal, so the sums are those of the
        weight itself.
        """
        return deviation_w4a8(weight, codes, *scale)

    def decode(self, codes: torch.Tensor, scale: W4A8Scale) -> torch.Tensor:
        """(N, K) float32 in the rotated basis: q8 * s_channel, q8 = clamp(round(level * s_rel),
        +-127).
        """
        return _decode(codes, *scale)

    def rescaled(self, scale: W4A8Scale, factor: float) -> W4A8Scale:
        """Group scales times factor as e4m3fn, at most 448; row scales stay."""
        return scale._replace(relative=rescaled_e4m3(scale.relative, factor))

    def region_errors(
        self, weight: torch.Tensor, codes: torch.Tensor, scale: W4A8Scale
    ) -> torch.Tensor:
        """Squared error of each group, (N, K/16)."""
        return group_errors_w4a8(weight, codes, *scale)

    def region_sums(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1, GROUP).sum(2)

    def columns(self, scale: W4A8Scale, index: torch.Tensor, shape: tuple[int, int]) -> Columns:
        relative = scale.relative.float()[:, index // GROUP].t()
        levels = constant(LEVELS, relative.device)
        return TableColumns(_int8_levels(levels[:, None], relative[:, None]), scale.channel)

    def chosen(self, take: torch.Tensor, scale: W4A8Scale, other: W4A8Scale) -> W4A8Scale:
        return scale._replace(relative=chosen_e4m3(take, scale.relative, other.relative))


def _row_slices(weight: torch.Tensor) -> Iterator[slice]:
    n, k = weight.shape
    # about ten temporaries of float32 are alive at once
    rows = chunk_rows(CHUNK_ELEMENTS // 4, k, weight.device)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


@op
def fit_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale of each group of 16 by alternating least squares of w ~ level * scale, and the largest
    |level * scale|.

    Args:
        weight: (N, K) float.

    Returns:
        (N, K/16) float32 each; a group whose absmax is below TINY has any positive scale and the
        largest 0. NaN gives NaN.
    """
    shape = len(weight), weight.shape[1] // GROUP
    scale, largest = (
        torch.empty(shape, dtype=torch.float32, device=weight.device) for _ in range(2)
    )
    for rows in _row_slices(weight):
        scale[rows], largest[rows] = (
            part.view(-1, shape[1]) for part in _fit(_columns(weight[rows].float()))
        )
    return scale, largest


def _why_not_groups(weight: torch.Tensor, *others: torch.Tensor) -> str | None:
    return why_not_double(weight) or why_not_triton(weight)


@fit_groups.backend("triton", _why_not_groups)
def _fit_groups(weight):
    from .triton import w4a8

    return w4a8.fit(weight, LEVELS, level_thresholds(), PASSES, FLOOR)


def _fit(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`fit_groups` of columns of 16."""
    absmax = groups.abs().amax(0)
    zero = absmax < TINY
    group_scale = torch.where(zero, 1.0, absmax)
    levels = _nearest_levels(groups, group_scale)
    for _ in range(PASSES):
        weighted, squared = _fold(groups * levels), _fold(levels * levels)
        group_scale = (weighted / squared.clamp_(min=FLOOR)).clamp_(min=FLOOR)
        levels = _nearest_levels(groups, group_scale)
    largest = (levels * group_scale).abs_().amax(0).masked_fill_(zero, 0.0)
    return group_scale, largest


@cache
def level_thresholds() -> tuple[float, ...]:
    """The largest float32 to which `round_level` gives each code from 0 to 14, by bisection."""
    low, high = torch.tensor(LEVELS[:-1]), torch.tensor(LEVELS[1:])
    codes = torch.arange(len(LEVELS) - 1)
    for _ in range(64):
        middle = (low.double() + high.double()).div(2).float()
        stays = round_level(middle) <= codes
        low, high = torch.where(stays, middle, low), torch.where(stays, high, middle)
    return tuple(low.tolist())


def _nearest_levels(groups: torch.Tensor, group_scale: torch.Tensor) -> torch.Tensor:
    return look_up(fast_codes(groups / group_scale, round_level), LEVELS)


@op
def nearest_w4a8(
    weight: torch.Tensor, channel: torch.Tensor, relative: torch.Tensor
) -> torch.Tensor:
    """(N, K) float and stored scales -> (N, K) uint8 codes of the nearest INT8 values, the lower
    one on a tie.
    """
    return _codes(weight, channel, relative, None)


@nearest_w4a8.backend("triton", _why_not_groups)
def _nearest_w4a8(weight, channel, relative):
    from .triton import w4a8

    return w4a8.nearest(weight, channel, relative, LEVELS)


def _codes(
    weight: torch.Tensor,
    channel: torch.Tensor,
    relative: torch.Tensor,
    generator: torch.Generator | None,
) -> torch.Tensor:
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in _row_slices(weight):
        codes[rows] = _choose(weight[rows].float(), channel[rows], relative[rows], generator)
    return codes


def _choose(
    w: torch.Tensor,
    channel: torch.Tensor,
    relative: torch.Tensor,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """(n, K) codes against the stored grid: the nearer of the two levels around w / s_channel, or
    one by chance.
    """
    v = _columns(w / channel[:, None])
    relative = relative.float().view(-1)
    # number of levels below v; levels ascend
    below = torch.zeros(v.shape, dtype=torch.uint8, device=w.device)
    for level in constant(LEVELS, w.device):
        below.add_(_int8_levels(level, relative) < v)
    last = len(LEVELS) - 1
    zero = _columns(w).abs().amax(0) < TINY
    if generator is not None:
        low = below.clamp_(1, last).sub_(1)
        lower, upper = (_int8_levels(look_up(code, LEVELS), relative) for code in (low, low + 1))
        threshold = (
            torch.rand(v.shape, generator=generator, device=v.device)
            .mul_(upper - lower)
            .add_(lower)
        )
        codes = low.add_(v > threshold)
    else:
        high = below.clamp(max=last)
        low = below.clamp_(min=1).sub_(1)
        above, under = (_int8_levels(look_up(code, LEVELS), relative) for code in (high, low))
        # never where high == low; else high == low + 1
        codes = low.add_((v - above).abs_() < (v - under).abs_())
    return codes.masked_fill_(zero, 0).t().reshape(w.shape)


def _q8(
    codes: torch.Tensor, relative: torch.Tensor, levels: tuple[float, ...] | torch.Tensor
) -> torch.Tensor:
    """(N, K) float32 integers from -127 to 127."""
    values = look_up(codes, levels).view(*relative.shape, GROUP)
    return values.mul_(relative.float()[..., None]).round_().clamp_(-127.0, 127.0).view(codes.shape)


def int8_values(
    packed: torch.Tensor, relative: torch.Tensor, levels: tuple[float, ...] | torch.Tensor
) -> torch.Tensor:
    """(N, K) int8 of stored codes, the low nibble first, in the rotated basis; of a scale that is
    NaN some number.
    """
    values = _q8(unpack_nibbles(packed, high_first=False), relative, levels)
    return values.nan_to_num_(0.0).to(torch.int8)


def _decode(codes: torch.Tensor, channel: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
    return _q8(codes, relative, LEVELS).mul_(channel[:, None])


@op
def deviation_w4a8(
    weight: torch.Tensor, codes: torch.Tensor, channel: torch.Tensor, relative: torch.Tensor
) -> Deviation:
    """The Deviation of codes, chunked; float32 sums within a chunk."""
    sums = Sums()
    for rows in _row_slices(weight):
        w = weight[rows].float().reshape(-1)
        difference = _decode(codes[rows], channel[rows], relative[rows]).view(-1).sub_(w)
        sums.add(difference, w)
    return sums.deviation()


@deviation_w4a8.backend("triton", _why_not_groups)
def _deviation_w4a8(weight, codes, channel, relative):
    from .triton import w4a8

    return total(*w4a8.errors(weight, codes, channel, relative, LEVELS))


@op
def group_errors_w4a8(
    weight: torch.Tensor, codes: torch.Tensor, channel: torch.Tensor, relative: torch.Tensor
) -> torch.Tensor:
    """Squared error of each group, (N, K/16) float32."""
    errors = torch.empty(relative.shape, dtype=torch.float32, device=weight.device)
    for rows in _row_slices(weight):
        difference = _decode(codes[rows], channel[rows], relative[rows]).sub_(weight[rows].float())
        errors[rows] = difference.square_().view(*relative[rows].shape, GROUP).sum(2)
    return errors


@group_errors_w4a8.backend("triton", _why_not_groups)
def _group_errors_w4a8(weight, codes, channel, relative):
    from .triton import w4a8

    return w4a8.errors(weight, codes, channel, relative, LEVELS)[0]


@op
def dequantize_w4a8(
    packed: torch.Tensor,
    relative: torch.Tensor,
    channel: torch.Tensor,
    levels: torch.Tensor,
    span: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Stored tensors -> the unrotated weight: sums of q8 are exact in any order, then rounded once
    each by two factors.

    Args:
        packed: (N, K/2) one byte per two codes, the low nibble first.
        relative, channel: as `W4A8Scale`.
        levels: (16,) float32.
        span: columns rotated together.

    Returns:
        (N, K) `dtype`: the float32 product with s_channel, rounded to it. NaN in a scale spreads
        over its span or row.
    """
    # no -0, whose sums keep their sign
    q8 = _q8(unpack_nibbles(packed, high_first=False), relative, levels).add_(0.0)
    return rotate(q8, span).mul_(channel[:, None]).to(dtype)


def _why_not_triton(packed, relative, channel, levels, span, dtype):
    return why_not_triton(packed) or (None if span in SPANS else f"rotated in groups of {span}")


@dequantize_w4a8.backend("triton", _why_not_triton)
def _dequantize_w4a8(packed, relative, channel, levels, span, dtype):
    from .triton import w4a8

    return w4a8.dequantize(packed, relative, channel, levels, span, dtype)


def _int8_levels(levels: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
    return (levels * relative).round_().clamp_(-127.0, 127.0)
