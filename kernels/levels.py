"""Levels of a number format: what a code is worth, and how a scaled value becomes one.

q = round(w / scale), w ~ q * scale. All arithmetic is float32 whatever the dtype of
w: docs/formats.md#numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Levels:
    """One number format: storage dtype, largest code value, and the in-place float32 step from w to
    a code value.

    `normalise_(x, scale)` turns float32 x into unrounded code values (multiply by the reciprocal,
    or divide: the choice decides rare codes and is part of the format); with a third tensor into
    that one. `round_(x)` clamps, and
    rounds where the cast would not. `widen(codes)` is the exact float32 value of each code;
    `values(rounded, codes, out)` times `unit` is that of finite codes made of what `round_` gave,
    which may be overwritten, as may `out`.
    `dither_(x, u)` moves x by u steps, u uniform in [-0.5, 0.5), and may round it, so that rounding
    gives x on average. `clear_zero_blocks`: the cast keeps the sign of -0, which a zero block must
    not show. `kernel`: the thresholds of a code table, () where rounding needs none; None where no
    GPU kernel rounds so.
    """

    name: str
    dtype: torch.dtype
    qmax: float
    normalise_: Callable[..., torch.Tensor]
    round_: Callable[[torch.Tensor], torch.Tensor]
    widen: Callable[[torch.Tensor], torch.Tensor]
    values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    dither_: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    unit: float = 1.0
    clear_zero_blocks: bool = False
    kernel: tuple[float, ...] | None = None


def by_reciprocal_(
    x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.mul(x, scale.reciprocal(), out=x if out is None else out)


def by_division_(
    x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.div(x, scale, out=x if out is None else out)


E4M3_MAX = 448.0
E4M3_UNIT = 256.0  # a float16 with the bits of an e4m3 moved into place is worth 1/256 of it


def _half_e4m3_(bits: torch.Tensor) -> torch.Tensor:
    """Sign-extended int16 codes -> float16, value / E4M3_UNIT: sign, exponent and mantissa moved
    into place.
    """
    # A shift leaves the sign in bits 15 and 14; bit 14 belongs to the exponent.
    return bits.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)


def _widen_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Exact float32 values by way of float16.

    torch's own cast reads 0.65 GB/s of codes on two CPU cores, this 2.9 (torch 2.11).
    """
    if codes.is_cuda:
        return codes.float()
    values = _half_e4m3_(codes.view(torch.int8).to(torch.int16)).float().mul_(E4M3_UNIT)
    # The two NaN codes come out as +-480, which no other code has. Looking for them in the floats
    # takes 0.1 ns per code on one core, comparing the codes took 1.0.
    if values.numel() and max(map(abs, torch.aminmax(values))) > E4M3_MAX:
        values.masked_fill_(values.abs() > E4M3_MAX, torch.nan)
    return values


def _widen_e5m2(codes: torch.Tensor) -> torch.Tensor:
    """Exact float32 values: e5m2 is the upper byte of float16, NaN and infinities included."""
    if codes.is_cuda:
        return codes.float()
    return codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(8).view(torch.float16).float()


def _scratch(rounded: torch.Tensor) -> torch.Tensor:
    """int16 in the first half of a float32 matrix's memory, in its shape."""
    return rounded.view(-1).view(torch.int16)[: rounded.numel()].view(rounded.shape)


def _values_e4m3(rounded: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(_half_e4m3_(_scratch(rounded).copy_(codes.view(torch.int8))))


def _values_e5m2(rounded: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    half = _scratch(rounded).copy_(codes.view(torch.int8)).bitwise_left_shift_(8)
    return out.copy_(half.view(torch.float16))


def _float_dither(
    mantissa_bits: int, min_exponent: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def dither_(x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        # frexp: x = m * 2^e with m in [0.5, 1)
        exponent = torch.frexp(x).exponent.sub_(1).clamp_(min=min_exponent)
        step = torch.ldexp(torch.ones_like(x), exponent - mantissa_bits)
        # Rounded on x's own steps: below a power of two the cast would use steps half as wide and
        # shift the mean.
        return x.add_(offset.mul_(step)).div_(step).round_().mul_(step)

    return dither_


def _float8(
    dtype: torch.dtype,
    qmax: float,
    *,
    widen: Callable[[torch.Tensor], torch.Tensor],
    values: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    dither_: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    unit: float = 1.0,
    kernel: tuple[float, ...] | None = None,
) -> Levels:
    """The cast rounds to nearest even; the clamp comes first, because overflow differs between
    torch versions.
    """
    return Levels(
        name=str(dtype).removeprefix("torch.float8_"),
        dtype=dtype,
        qmax=qmax,
        normalise_=by_reciprocal_,
        round_=lambda x: x.clamp_(-qmax, qmax),
        widen=widen,
        values=values,
        dither_=dither_,
        unit=unit,
        clear_zero_blocks=True,
        kernel=kernel,
    )


def _integers(name: str, qmax: float, kernel: tuple[float, ...] | None = None) -> Levels:
    return Levels(
        name=name,
        dtype=torch.int8,
        qmax=qmax,
        normalise_=by_division_,
        round_=lambda x: x.round_().clamp_(-qmax, qmax),
        widen=torch.Tensor.float,
        values=lambda rounded, codes, out: rounded,
        dither_=torch.Tensor.add_,
        kernel=kernel,
    )


E4M3 = _float8(
    torch.float8_e4m3fn,
    E4M3_MAX,
    widen=_widen_e4m3,
    values=_values_e4m3,
    dither_=_float_dither(3, -6),
    unit=E4M3_UNIT,
    kernel=(),
)
E5M2 = _float8(
    torch.float8_e5m2,
    57344.0,
    widen=_widen_e5m2,
    values=_values_e5m2,
    dither_=_float_dither(2, -14),
)
INT8 = _integers("int8", 127.0, kernel=())
INT4 = _integers("int4", 7.0)


@cache
def code_values(levels: Levels) -> tuple[float, ...]:
    """The value of each of the 16 codes."""
    return tuple(levels.widen(torch.arange(16, dtype=torch.uint8)).tolist())
