"""Arithmetic that gives the bits torch gives: IEEE division, magnitudes that keep NaN, rounding
with ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; the plain operator is one ulp off."""
    return tl.math.div_rn(a, b)


@triton.jit
def product(a, b):
    """a * b, rounded; -0 becomes +0. The plain operator might leave that to an addition that
    follows.
    """
    return tl.math.fma(a, b, 0.0)


@triton.jit
def magnitude(x):
    """|x| of a float32 as int32 bits: ordered like the numbers, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(absmax, QMAX: tl.constexpr, FLOOR: tl.constexpr):
    """absmax / qmax, 1 for zeros. NaN won every comparison before: magnitudes are compared as
    bits.
    """
    return tl.where(absmax < FLOOR, 1.0, divide(absmax, QMAX) if QMAX != 1.0 else absmax)


@triton.jit
def round_int8(x):
    """Nearest even integer in [-127, 127]; NaN becomes some code."""
    return nearest_integer(tl.minimum(tl.maximum(x, -127.0), 127.0))


@triton.jit
def nearest_even(x):
    """Nearest even integer of |x| < 2^22, as float32; NaN stays."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23: float32 has no fraction bits there


@triton.jit
def nearest_integer(x):
    """Nearest even integer of |x| < 128 as int8."""
    # 1.5 * 2^23: float32 has no fraction bits there, and the low byte of its bits is the integer.
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def divide_small(a, b, inverse):
    """a / b, correctly rounded, in three operations; `inverse` is 1 / b correctly rounded
    (Markstein 1990).

    For quotients far from overflow; tiny ones may be off, where they round to 0 anyway.
    """
    guess = a * inverse
    return tl.math.fma(tl.math.fma(-guess, b, a), inverse, guess)


@triton.jit
def divide_many(a, b, inverse):
    """`divide_small` for any quotient: past 1e30, which is past all codes, it is inexact."""
    guess = a * inverse
    # the remainder would overflow
    return tl.where(tl.abs(guess) < 1e30, divide_small(a, b, inverse), guess)
