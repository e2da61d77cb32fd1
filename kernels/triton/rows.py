"""Rows to INT8 with one pass over memory: read or decoded, rotated, q = round(v / scale), scale =
absmax of the row / 127.

Rows are activations, or stored codes of a weight that a product of 8-bit codes then reads. A
program holds a whole row, so that nothing is read twice and no scale need be known before.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ..codebook4 import constant
from ..hadamard import rotate
from ..scales import TINY, Geometry
from .launch import launch
from .lut import table_asm
from .rounding import divide, magnitude, product, round_int8, scale_of
from .tiles import kind_of, widen

MOST = 32768  # elements of a row that the registers of a program hold
# how a row is stored; two codes in a byte up to NVFP4
PLAIN, FLAT4, NVFP4, TILES, MXFP8 = range(5)
_PLAIN, _NVFP4, _MXFP8 = (tl.constexpr(kind) for kind in (PLAIN, NVFP4, MXFP8))


@triton.jit
def values_of(byte, table, ASM: tl.constexpr, SPEC: tl.constexpr):
    """float32 values of the high and the low nibble of each byte; a table in memory is what the
    assembly has in registers.
    """
    return tl.inline_asm_elementwise(
        ASM, SPEC, [byte], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
    )


@triton.jit
def _swizzled(row, column, columns):
    """Where the scale of (row, column) of a grid lies in cuBLAS's order; `columns` is a multiple
    of 4.
    """
    tile = (row // 128) * (columns // 4) + column // 4
    return tile * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4


@triton.jit
def _scales(
    scale, row, k, across, tile_rows, STORED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """The scale of each group of a row, as a column; 0 past its end."""
    group = tl.arange(0, BLOCK // GROUP)
    inside = group < k // GROUP
    if STORED == _NVFP4:
        raw = tl.load(scale + _swizzled(row, group, across), inside, other=0)
        found = widen(raw.to(tl.int8, bitcast=True), 1)
    elif STORED == _MXFP8:  # a power of two by its exponent; byte 0 marks a block of zeros
        raw = tl.load(scale + _swizzled(row, group, across), inside, other=0)
        found = (raw.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        found = tl.load(scale + row // tile_rows * across + group, inside, other=0.0)
    return found[:, None]


@triton.jit
def _row(
    stored, scale, whole, table, row, k, stride, across, tile_rows,
    STORED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    ASM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """(BLOCK,) float32 values of a row, zeros past its end."""
    at = tl.arange(0, BLOCK)
    if STORED == _PLAIN:
        value = tl.load(stored + row * stride + at, at < k, other=0.0).to(tl.float32)
    else:
        if STORED <= _NVFP4:
            half = tl.arange(0, BLOCK // 2)
            byte = tl.load(stored + row * stride + half, half < k // 2, other=0)
            high, low = values_of(byte, table, ASM, SPEC)
            value = tl.reshape(tl.join(high, low), (BLOCK // GROUP, GROUP))
        else:
            raw = tl.load(stored + row * stride + at, at < k, other=0)
            value = tl.reshape(widen(raw, KIND), (BLOCK // GROUP, GROUP))
        factor = _scales(scale, row, k, across, tile_rows, STORED, GROUP, BLOCK)
        if STORED == _NVFP4:
            factor = factor * tl.load(whole)
        value = tl.reshape(value * factor, (BLOCK,))
    return value


@triton.jit
def _power_of_two(absmax):
    """The power of two that brings a magnitude, given as float32 bits, into [1, 2); some number
    for NaN and infinity.
    """
    return tl.maximum(0x7F000000 - (absmax & 0x7F800000), 0x00400000).to(tl.float32, bitcast=True)


@triton.jit
def _rotated(value, signs, SIDE: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK / SIDE, SIDE) float32 of a row, whose largest is below 2, times the signs of the
    rotation; every 256 elements turned round (16 by 16) where TWICE.

    float16 keeps 11 bits of each element and of each sum between two products.
    """
    across = tl.arange(0, SIDE)
    sign = tl.load(signs + across[:, None] * SIDE + across[None, :])
    sums = tl.dot(tl.reshape(value, (BLOCK // SIDE, SIDE)).to(tl.float16), sign)
    if TWICE:
        turned = tl.permute(tl.reshape(sums.to(tl.float16), (BLOCK // 256, SIDE, SIDE)), (0, 2, 1))
        sums = tl.dot(tl.reshape(turned, (BLOCK // SIDE, SIDE)), sign)
    return sums


@triton.jit
def _rounded(
    value, signs, SIDE: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr,
    FACTOR: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """(BLOCK,) INT8 codes of a row, rotated before, and their scale."""
    power = _power_of_two(tl.max(magnitude(value), 0))
    value = _rotated(value * power, signs, SIDE, TWICE, BLOCK)
    largest = tl.max(tl.max(magnitude(value), 1), 0).to(tl.float32, bitcast=True)
    absmax = divide(largest * FACTOR, power)
    code = round_int8(value * tl.where(absmax < FLOOR, 0.0, divide(127.0, largest)))
    if TWICE:
        code = tl.permute(tl.reshape(code, (BLOCK // 256, SIDE, SIDE)), (0, 2, 1))
    return tl.reshape(code, (BLOCK,)), scale_of(absmax, 127.0, FLOOR)


@triton.jit
def _rows(
    stored, scale, whole, table, signs, out, scales, k, stride, across, tile_rows,
    STORED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
    ASM: tl.constexpr, SPEC: tl.constexpr, SIDE: tl.constexpr, TWICE: tl.constexpr,
    FACTOR: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """The values of a row in the dtype of `out`; rotated and rounded to INT8 unless SIDE is 0."""
    row = tl.program_id(0).to(tl.int64)
    value = _row(
        stored, scale, whole, table, row, k, stride, across, tile_rows,
        STORED, GROUP, BLOCK, KIND, ASM, SPEC,
    )  # fmt: skip
    at = tl.arange(0, BLOCK)
    if SIDE > 0:
        code, found = _rounded(value, signs, SIDE, TWICE, BLOCK, FACTOR, FLOOR)
        tl.store(scales + row, found)
        tl.store(out + row * k + at, code, at < k)
    else:
        tl.store(out + row * k + at, value.to(out.dtype.element_ty), at < k)


@triton.jit
def _levels(
    packed, relative, channel, levels, floats, codes, scales, k, BLOCK: tl.constexpr,
):  # fmt: skip
    """The INT8 values of a row of W4A8 codes, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    half, group = tl.arange(0, BLOCK // 2), tl.arange(0, BLOCK // 16)
    byte = tl.load(packed + row * (k // 2) + half, half < k // 2, other=0).to(tl.int32)
    level = tl.join(tl.load(levels + (byte & 15)), tl.load(levels + (byte >> 4)))
    raw = tl.load(relative + row * (k // 16) + group, group < k // 16, other=0)
    step = tl.load(floats + raw.to(tl.int32))
    # as bits NaN is larger than every number
    bad = tl.max(magnitude(step), 0) > 0x7F800000
    tl.store(scales + row, tl.where(bad, float("nan"), tl.load(channel + row)))
    value = product(tl.reshape(level, (BLOCK // 16, 16)), step[:, None])
    at = tl.arange(0, BLOCK)
    tl.store(codes + row * k + at, round_int8(tl.reshape(value, (BLOCK,))), at < k)


@cache
def _signs(side: int, device: torch.device) -> torch.Tensor:
    """(side, side) float16 rotation, its entries +-1."""
    return (rotate.eager(torch.eye(side), side) * side**0.5).to(device, torch.float16)


@cache
def _bytes(device: torch.device) -> torch.Tensor:
    """(256,) float32 value of each e4m3fn byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


# (longest row, warps of a program)
WARPS = ((4096, 4), (8192, 8), (MOST, 16))


def _shape(k: int) -> tuple[int, int]:
    """Elements of a program, of which tensor cores multiply at least 16 by 64, and its warps."""
    block = max(1 << (k - 1).bit_length(), 1024)
    return block, next(warps for most, warps in WARPS if block <= most)


class Stored:
    """Rows as a kernel reads them: tensors and numbers of its arguments."""

    def __init__(
        self,
        how: int,
        rows: torch.Tensor,
        k: int,
        *,
        scale: torch.Tensor | None = None,
        whole: torch.Tensor | None = None,
        values: tuple[float, ...] | None = None,
        across: int = 1,
        tile_rows: int = 1,
        group: int = 16,
        kind: int = 0,
    ):
        scale = rows if scale is None else scale
        table = scale if values is None else constant(values, rows.device)
        asm = ("", "") if values is None else table_asm(values, torch.float32)
        block, self.warps = _shape(k)
        self.k, self.tensors = k, (rows, scale, scale if whole is None else whole, table)
        self.numbers = (k, rows.stride(0), across, tile_rows, how, group, block, kind, *asm)


def plain(x: torch.Tensor) -> Stored:
    """(M, K) floats."""
    return Stored(PLAIN, x if x.stride(1) == 1 else x.contiguous(), x.shape[1])


def flat4(
    packed: torch.Tensor, absmax: torch.Tensor, values: tuple[float, ...], group: int
) -> Stored:
    """(N, K/2) bytes, high nibble first, a scale per `group` of a row; K a multiple of it."""
    k = 2 * packed.shape[1]
    how = {"scale": absmax, "values": values, "across": k // group, "group": group}
    return Stored(FLAT4, packed.contiguous(), k, **how)


def tiles(codes: torch.Tensor, scale: torch.Tensor, geometry: Geometry) -> Stored:
    """(N, K) 8-bit codes with a grid of scales, several along K."""
    rows, cols = geometry.rows, geometry.cols
    k, raw = codes.shape[1], codes.contiguous().view(torch.int8)
    how = {"across": k // cols, "tile_rows": rows, "group": cols, "kind": kind_of(codes)}
    return Stored(TILES, raw, k, scale=scale.contiguous(), **how)


def e2m1(
    packed: torch.Tensor, block: torch.Tensor, per_tensor: torch.Tensor, values: tuple[float, ...]
) -> Stored:
    """(N, K/2) bytes, high nibble first, swizzled e4m3fn scales of 16, one of all."""
    k = 2 * packed.shape[1]
    scale = block.contiguous().view(torch.uint8)
    across = -(-k // 64) * 4
    how = {"scale": scale, "whole": per_tensor, "values": values, "across": across}
    return Stored(NVFP4, packed.contiguous(), k, **how)


def e4m3_mx(codes: torch.Tensor, exponent: torch.Tensor) -> Stored:
    """(N, K) e4m3fn codes with swizzled exponents of 32."""
    k, raw = codes.shape[1], codes.contiguous().view(torch.int8)
    scale = exponent.contiguous().view(torch.uint8)
    across, kind = -(-k // 128) * 4, kind_of(codes)
    return Stored(MXFP8, raw, k, scale=scale, across=across, group=32, kind=kind)


def quantize(stored: Stored, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) INT8 codes of the rotated rows and (M, 1) float32 scales, in memory as those of
    `activations.quantize`.
    """
    m, k = len(stored.tensors[0]), stored.k
    device = stored.tensors[0].device
    codes = torch.empty((m, k), dtype=torch.int8, device=device)
    scales = torch.empty((1, -(-m // 4) * 4), dtype=torch.float32, device=device)
    side = 16 if span == 256 else span
    tensors = (*stored.tensors, _signs(side, device), codes, scales)
    numbers = (*stored.numbers, side, span == 256, span**-0.5, TINY)
    launch(_rows, (m, 1, 1), tensors, *numbers, num_warps=stored.warps)
    return codes, scales[:, :m].t()


def decode(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    """(N, K) `dtype`: float32 products, rounded once."""
    n = len(stored.tensors[0])
    out = torch.empty((n, stored.k), dtype=dtype, device=stored.tensors[0].device)
    tensors = (*stored.tensors, out, out, out)  # neither signs nor scales
    numbers = (*stored.numbers, 0, False, 1.0, TINY)
    launch(_rows, (n, 1, 1), tensors, *numbers, num_warps=stored.warps)
    return out


def w4a8(
    packed: torch.Tensor, relative: torch.Tensor, channel: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, K/2) bytes, the low nibble first, (N, K/16) float8_e4m3fn, (N,) float32 -> (N, K) INT8
    values, (N, 1) scales: NaN where one of a row is.
    """
    n, half = packed.shape
    codes = torch.empty((n, 2 * half), dtype=torch.int8, device=packed.device)
    block, warps = _shape(2 * half)
    stored = (tensor.contiguous().view(torch.uint8) for tensor in (packed, relative))
    scales = torch.empty((n, 1), dtype=torch.float32, device=packed.device)
    tensors = (*stored, channel.contiguous(), table, _bytes(packed.device), codes, scales)
    launch(_levels, (n, 1, 1), tensors, 2 * half, block, num_warps=warps)
    return codes, scales
