"""What a runtime tensor does with its stored codes: dequantize to a dtype, and multiply without
dequantizing first.

Spec of all bodies: the float32 product code * scale, rounded once to the output dtype; matmuls
accumulate in float32. 8-bit codes of one kind multiply activations quantized to the same kind.
Where a measured table prefers it, x stays as it is (closer to the unquantized product, never
further).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from . import choice, scaled_mm
from .activations import quantize_activations
from .codebook4 import FlatGrid
from .cuda import why_not_cuda
from .device import gpu_of
from .dispatch import op, ordered
from .grids import Levels, code_values, decode
from .kinds import Codes
from .packing import unpack_nibbles
from .scaled_mm import why_not_scaled_mm
from .scales import CHUNK_ELEMENTS, Geometry
from .triton import why_not_float8, why_not_triton


@op
def dequantize_tiles(
    codes: torch.Tensor, scale: torch.Tensor, levels: Levels, geometry: Geometry, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K) codes and their `geometry.grid_shape` float32 scales -> (N, K) `dtype`."""
    return decode(codes, scale, levels, geometry).to(dtype)


@op
def dequantize_flat4(
    packed: torch.Tensor, absmax: torch.Tensor, levels: Levels, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K/2) uint8, high nibble first, and (ceil(N*K/group_size),) float32 -> (N, K) `dtype`."""
    codes = unpack_nibbles(packed, high_first=True)
    return FlatGrid(levels, group_size).decode(codes, absmax).to(dtype)


@dequantize_tiles.backend("triton", lambda codes, *rest: why_not_triton(codes))
def _dequantize_tiles(codes, scale, levels, geometry, dtype):
    from .triton import tiles

    return tiles.dequantize(codes, scale, geometry, dtype)


@dequantize_flat4.backend("triton", lambda packed, *rest: why_not_triton(packed))
def _dequantize_flat4(packed, absmax, levels, group_size, dtype):
    from .triton import flat4

    return flat4.dequantize(packed, absmax, code_values(levels), group_size, dtype)


def _measured(x: torch.Tensor, n: int, family: str) -> Iterator[tuple[str, str]]:
    """What the tables say of x times a weight of n rows; without a GPU nothing is measured."""
    gpu = gpu_of(x)
    if gpu is not None:
        rows = choice.rows_for(family, *(len(x), n, x.shape[1]), gpu)
        return ((row.path, row.why) for row in rows)
    where = f"tensor is on {x.device.type}"
    return iter([("eager" if x.device.type == "cpu" else "dequantize", where)])


def _tiles_order(x, codes, scale, levels, geometry, bias):
    return _measured(x, len(codes), choice.family(Codes.of(levels.dtype), geometry))


@ordered(_tiles_order)
def linear_tiles(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    levels: Levels,
    geometry: Geometry,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias for INT8 and e4m3fn codes, x quantized to the weight's levels per row, or per
    row and K-group.

    Eager rounds both decoded factors to x's dtype; kernels multiply the codes and scale float32
    sums.

    Args:
        x: (M, K) float32, float16 or bfloat16.
        codes, scale: as `dequantize_tiles`.
        geometry: scales of the whole tensor, of rows, of tiles or of groups along K.
        bias: (N,) of x's dtype, or None.
    """
    rounded = decode(
        *quantize_activations(x, levels, geometry.cols), levels, Geometry(1, geometry.cols)
    ).to(x.dtype)
    return linear(rounded, dequantize_tiles(codes, scale, levels, geometry, x.dtype), bias)


def _why_not_torch(x, codes, scale, levels, geometry, bias):
    return why_not_scaled_mm(x, codes, geometry)


@linear_tiles.backend("torch", _why_not_torch)
def _linear_tiles_torch(x, codes, scale, levels, geometry, bias):
    return scaled_mm.linear(x, codes, scale, bias, geometry)


def _why_not_hopper(x, codes, group):
    from .cuda import wide

    return (
        why_not_cuda(x)
        or wide.why_not_device(x)
        or wide.why_not_shape(len(codes), x.shape[1], codes.dtype, group, x.dtype)
    )


def _why_not_tiles_hopper(x, codes, scale, levels, geometry, bias):
    return why_not_triton(x) or _why_not_hopper(x, codes, geometry.cols)


@linear_tiles.backend("hopper", _why_not_tiles_hopper)
def _linear_tiles_hopper(x, codes, scale, levels, geometry, bias):
    from .cuda import wide
    from .triton import activations

    x_codes, x_scale = activations.quantize(x, levels.dtype, levels.qmax, geometry.cols)
    return wide.multiply(
        x_codes, x_scale, codes, scale, bias, x.dtype, geometry.cols, geometry.rows or len(codes)
    )


def _why_not_skinny(x, codes, scale, levels, geometry, bias):
    from .cuda import skinny

    return why_not_cuda(x) or skinny.why_not_shape(*x.shape, geometry.cols, x.dtype)


@linear_tiles.backend("cuda", _why_not_skinny)
def _linear_tiles_skinny(x, codes, scale, levels, geometry, bias):
    from .cuda import skinny

    return skinny.multiply(x, codes, scale, bias, geometry.cols, geometry.rows or len(codes))


def _why_not_coded(x, codes, scale, levels, geometry, bias):
    reason = why_not_triton(x)
    if levels.dtype == torch.float8_e4m3fn:
        reason = reason or why_not_float8(x)
        if x.dtype == torch.float32:
            reason = reason or "float32 input: FP8 tensor cores keep 14 bits of each sum"
    return reason


@linear_tiles.backend("triton", _why_not_coded)
def _linear_tiles_coded(x, codes, scale, levels, geometry, bias):
    from .triton import w8a8

    return w8a8.linear(x, codes, scale, bias, geometry)


def _why_not_library(x, *rest):
    return "tensor is on cpu" if x.device.type == "cpu" else None


@linear_tiles.backend("dequantize", _why_not_library)
def _linear_tiles_library(x, codes, scale, levels, geometry, bias):
    return linear(x, dequantize_tiles(codes, scale, levels, geometry, x.dtype), bias)


def _flat4_order(x, packed, absmax, levels, group_size, bias):
    return _measured(x, len(packed), choice.family(Codes.FOUR_BIT))


@ordered(_flat4_order)
def linear_flat4(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    levels: Levels,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias for 4-bit codes, products accumulated in float32.

    Eager rounds W to x's dtype; the fused kernel rounds the table instead and multiplies absmax in
    float32.

    Args:
        x: (M, K) float32, float16 or bfloat16.
        packed, absmax: as `dequantize_flat4`.
        bias: (N,) of x's dtype, or None.
    """
    n, k = packed.shape[0], 2 * packed.shape[1]
    rows = CHUNK_ELEMENTS // max(k, 1)
    if x.device.type != "cpu" or rows >= n or not rows or k % group_size:
        return linear(x, dequantize_flat4(packed, absmax, levels, group_size, x.dtype), bias)
    out = torch.empty((x.shape[0], n), dtype=x.dtype)
    for start in range(0, n, rows):  # decoded rows are multiplied while they are in the cache
        part = slice(start, min(start + rows, n))
        scale = absmax[part.start * k // group_size : part.stop * k // group_size]
        weight = dequantize_flat4(packed[part], scale, levels, group_size, x.dtype)
        out[:, part] = linear(x, weight, None if bias is None else bias[part])
    return out


def _why_not_flat4_hopper(x, packed, absmax, levels, group_size, bias):
    return _why_not_hopper(x, packed, group_size)


@linear_flat4.backend("hopper", _why_not_flat4_hopper)
def _linear_flat4_hopper(x, packed, absmax, levels, group_size, bias):
    from .cuda import wide

    return wide.multiply(x, None, packed, absmax, bias, x.dtype, group_size, 1, code_values(levels))


def _why_not_fused(x, packed, absmax, levels, group_size, bias):
    from .cuda import skinny

    return why_not_cuda(x) or skinny.why_not_shape(*x.shape, group_size, x.dtype)


@linear_flat4.backend("cuda", _why_not_fused)
def _linear_flat4(x, packed, absmax, levels, group_size, bias):
    from .cuda import skinny

    return skinny.multiply(x, packed, absmax, bias, group_size, 1, code_values(levels))


@linear_flat4.backend("dequantize", lambda x, packed, *rest: why_not_triton(packed))
def _linear_flat4_library(x, packed, absmax, levels, group_size, bias):
    return linear(x, _dequantize_flat4(packed, absmax, levels, group_size, x.dtype), bias)
