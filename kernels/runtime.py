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

from . import choice, rows, scaled_mm
from .activations import quantize_activations
from .codebook4 import E2M1, FlatGrid
from .cuda import rows as cuda_rows
from .cuda import why_not_cuda
from .device import gpu_of
from .dispatch import op, ordered
from .grids import decode
from .hadamard import rotate
from .kinds import Codes
from .levels import INT8, Levels, code_values
from .packing import unpack_nibbles
from .scaled_mm import why_not_scaled_mm
from .scales import CHUNK_ELEMENTS, Geometry
from .triton import why_not_float8, why_not_triton
from .w4a8 import dequantize_w4a8


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

    x_codes, x_scale = activations.quantize(x, levels, geometry.cols)
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
    if x.device.type == "cpu":
        return "tensor is on cpu"
    return None


def _int8_product(x_codes, x_scale, codes, scale, bias, dtype):
    """INT8 rows times INT8 rows by the kernel that this GPU has."""
    from .cuda import wide
    from .triton import w8a8

    n, k = codes.shape
    if gpu_of(x_codes).wgmma and not wide.why_not_shape(n, k, codes.dtype, None, dtype):
        return wide.multiply(x_codes, x_scale, codes, scale, bias, dtype, None, 1)
    return w8a8.rows_product(x_codes, x_scale, codes, scale, bias, dtype)


def _scratch_product(x, bias, kind, *stored, span=None):
    """x @ W.T + bias by INT8 rows made of W as it is stored; x is rotated and quantized alike."""
    k = x.shape[1]
    span = span or rows.span_of(k)
    codes, scale = rows.make(kind, k, span, *stored)
    x_codes, x_scale = rows.make("plain", k, span, x)
    return _int8_product(x_codes, x_scale, codes, scale, bias, x.dtype)


def _why_not_scratch(x, span):
    """Why x is not multiplied by INT8 rows made of W; None when it is."""
    return rows.why_not_rows(x, x.shape[1], span) or rows.why_not_floats(x)


def _why_not_tiles_scratch(x, codes, scale, levels, geometry, bias):
    span = rows.span_of(x.shape[1])
    return _why_not_scratch(x, span) or rows.why_not_tiles(codes, scale, levels, geometry, span)


@linear_tiles.backend("scratch", _why_not_tiles_scratch)
def _linear_tiles_scratch(x, codes, scale, levels, geometry, bias):
    return _scratch_product(x, bias, "tiles", codes, scale, geometry)


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


def _why_not_flat4_scratch(x, packed, absmax, levels, group_size, bias):
    span = rows.span_of(x.shape[1])
    reason = _why_not_scratch(x, span)
    return reason or rows.why_not_flat4(packed, absmax, levels, group_size, span)


@linear_flat4.backend("scratch", _why_not_flat4_scratch)
def _linear_flat4_scratch(x, packed, absmax, levels, group_size, bias):
    return _scratch_product(x, bias, "flat4", packed, absmax, code_values(levels), group_size)


@linear_flat4.backend("dequantize", lambda x, packed, *rest: why_not_triton(packed))
def _linear_flat4_library(x, packed, absmax, levels, group_size, bias):
    return linear(x, _dequantize_flat4(packed, absmax, levels, group_size, x.dtype), bias)


def _rotated_order(x, codes, scale, span, bias):
    return _measured(x, len(codes), "int8 rotated")


@ordered(_rotated_order)
def linear_rotated(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    span: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias for INT8 codes of a weight rotated `span` by `span` (ConvRot): x is rotated
    too, and quantized to INT8 rows.

    Eager rounds both decoded factors to x's dtype; kernels multiply the codes.

    Args:
        x: (M, K) float32, float16 or bfloat16.
        codes, scale: (N, K) int8, (N, 1) float32.
        bias: (N,) of x's dtype, or None.
    """
    geometry = Geometry(1, None)
    rounded = decode(*rows.quantize_rotated(x, span), INT8, geometry).to(x.dtype)
    return linear(rounded, dequantize_tiles(codes, scale, INT8, geometry, x.dtype), bias)


def _why_not_rotated_hopper(x, codes, scale, span, bias):
    return _why_not_scratch(x, span) or _why_not_hopper(x, codes, None)


@linear_rotated.backend("hopper", _why_not_rotated_hopper)
def _linear_rotated_hopper(x, codes, scale, span, bias):
    from .cuda import wide

    x_codes, x_scale = rows.make("plain", x.shape[1], span, x)
    return wide.multiply(x_codes, x_scale, codes, scale, bias, x.dtype, None, 1)


def _why_not_rotated_skinny(x, codes, scale, span, bias):
    from .cuda import skinny

    return why_not_cuda(x) or why_not_triton(x) or skinny.why_not_shape(*x.shape, None, x.dtype)


@linear_rotated.backend("cuda", _why_not_rotated_skinny)
def _linear_rotated_skinny(x, codes, scale, span, bias):
    from .cuda import skinny

    return skinny.multiply(rotate(x, span).to(x.dtype), codes, scale, bias, None, 1)


@linear_rotated.backend("triton", lambda x, codes, scale, span, bias: _why_not_scratch(x, span))
def _linear_rotated_coded(x, codes, scale, span, bias):
    from .triton import w8a8

    x_codes, x_scale = rows.make("plain", x.shape[1], span, x)
    return w8a8.rows_product(x_codes, x_scale, codes, scale, bias, x.dtype)


@linear_rotated.backend("dequantize", lambda x, *rest: why_not_triton(x))
def _linear_rotated_library(x, codes, scale, span, bias):
    turned = rotate(x, span).to(x.dtype)
    return linear(turned, dequantize_tiles(codes, scale, INT8, Geometry(1, None), x.dtype), bias)


def _nvfp4_order(x, packed, *rest):
    return _measured(x, len(packed), "e2m1")


@ordered(_nvfp4_order)
def linear_nvfp4(
    x: torch.Tensor,
    packed: torch.Tensor,
    block: torch.Tensor,
    per_tensor: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias for NVFP4, W rounded to x's dtype; x stays as it is.

    Args:
        x: (M, K) float32, float16 or bfloat16.
        packed, block, per_tensor: as `rows.dequantize_nvfp4`.
    """
    return linear(x, rows.dequantize_nvfp4(packed, block, per_tensor, x.dtype), bias)


def _why_not_nvfp4_scratch(x, packed, *rest):
    return _why_not_scratch(x, rows.span_of(x.shape[1]))


@linear_nvfp4.backend("scratch", _why_not_nvfp4_scratch)
def _linear_nvfp4_scratch(x, packed, block, per_tensor, bias):
    return _scratch_product(x, bias, "e2m1", packed, block, per_tensor, code_values(E2M1))


@linear_nvfp4.backend("dequantize", lambda x, *rest: why_not_triton(x))
def _linear_nvfp4_library(*args):
    return linear_nvfp4.eager(*args)


def _mxfp8_order(x, codes, *rest):
    return _measured(x, len(codes), "e4m3_mx")


@ordered(_mxfp8_order)
def linear_mxfp8(
    x: torch.Tensor, codes: torch.Tensor, exponent: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x @ W.T + bias for MXFP8, W rounded to x's dtype; x stays as it is.

    Args:
        x: (M, K) float32, float16 or bfloat16.
        codes, exponent: as `rows.dequantize_mxfp8`.
    """
    return linear(x, rows.dequantize_mxfp8(codes, exponent, x.dtype), bias)


def _why_not_mxfp8_scratch(x, *rest):
    return _why_not_scratch(x, rows.span_of(x.shape[1]))


@linear_mxfp8.backend("scratch", _why_not_mxfp8_scratch)
def _linear_mxfp8_scratch(x, codes, exponent, bias):
    return _scratch_product(x, bias, "e4m3_mx", codes, exponent)


@linear_mxfp8.backend("dequantize", lambda x, *rest: why_not_triton(x))
def _linear_mxfp8_library(*args):
    return linear_mxfp8.eager(*args)


def _w4a8_order(x, packed, *rest):
    return _measured(x, len(packed), "w4a8")


@ordered(_w4a8_order)
def linear_w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    relative: torch.Tensor,
    channel: torch.Tensor,
    levels: torch.Tensor,
    span: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ W.T + bias for W4A8, W rounded to x's dtype; x stays as it is.

    Args:
        x: (M, K) float32, float16 or bfloat16.
        packed, relative, channel, levels, span: as `dequantize_w4a8`.
    """
    weight = dequantize_w4a8(packed, relative, channel, levels, span, x.dtype)
    return linear(x, weight, bias)


def _why_not_w4a8_scratch(x, packed, relative, channel, levels, span, bias):
    return _why_not_scratch(x, span)


@linear_w4a8.backend("scratch", _why_not_w4a8_scratch)
def _linear_w4a8_scratch(x, packed, relative, channel, levels, span, bias):
    return _scratch_product(x, bias, "w4a8", packed, relative, channel, levels, span=span)


@linear_w4a8.backend("dequantize", lambda x, *rest: why_not_triton(x))
def _linear_w4a8_library(*args):
    return linear_w4a8.eager(*args)


def _ready_rows(x, codes, scale, rows_per_scale, rotate):
    """A product of rows by wide.cu, ready for more calls; None where x is quantized by Triton."""
    from .cuda import ready

    reason = cuda_rows.why_not_rows(x, x.shape[1])
    if reason or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    return ready.quantized(x, codes, scale, rows_per_scale, rotate=rotate)


def _ready_tiles_hopper(x, codes, scale, levels, geometry, bias):
    if geometry.cols is not None:
        return None
    return _ready_rows(x, codes, scale, geometry.rows or len(codes), False)


def _ready_rotated_hopper(x, codes, scale, span, bias):
    if span == cuda_rows.SPAN:
        return _ready_rows(x, codes, scale, 1, True)
    return None


def _ready_tiles_skinny(x, codes, scale, levels, geometry, bias):
    from .cuda import ready

    return ready.as_it_is(x, codes, scale, geometry.cols, geometry.rows or len(codes))


def _ready_flat4_skinny(x, packed, absmax, levels, group_size, bias):
    from .cuda import ready

    return ready.as_it_is(x, packed, absmax, group_size, 1, code_values(levels))


def _ready_scratch(x, n, kind, *stored, span=None):
    """A product by INT8 rows made of W, ready for more calls; None where Triton makes them."""
    from .cuda import ready, wide

    k = x.shape[1]
    span = span or rows.span_of(k)
    fits = not wide.why_not_shape(n, k, torch.int8, None, x.dtype)
    if span != cuda_rows.SPAN or cuda_rows.why_not_rows(x, k) or not gpu_of(x).wgmma or not fits:
        return None
    given = tuple(part for part in stored if isinstance(part, torch.Tensor))
    return ready.scratch(x, getattr(cuda_rows, kind)(*stored), n, given, rotate=True)


def _ready_tiles_scratch(x, codes, scale, levels, geometry, bias):
    return _ready_scratch(x, len(codes), "tiles", codes, scale, geometry)


def _ready_flat4_scratch(x, packed, absmax, levels, group_size, bias):
    return _ready_scratch(x, len(packed), "flat4", packed, absmax, code_values(levels), group_size)


def _ready_nvfp4_scratch(x, packed, block, per_tensor, bias):
    stored = (packed, block, per_tensor, code_values(E2M1))
    return _ready_scratch(x, len(packed), "e2m1", *stored)


def _ready_mxfp8_scratch(x, codes, exponent, bias):
    return _ready_scratch(x, len(codes), "e4m3_mx", codes, exponent)


def _ready_w4a8_scratch(x, packed, relative, channel, levels, span, bias):
    stored = (packed, relative, channel, levels)
    return _ready_scratch(x, len(packed), "w4a8", *stored, span=span)


linear_tiles.prepared.update(
    hopper=_ready_tiles_hopper, cuda=_ready_tiles_skinny, scratch=_ready_tiles_scratch
)
linear_rotated.prepared["hopper"] = _ready_rotated_hopper
linear_flat4.prepared.update(cuda=_ready_flat4_skinny, scratch=_ready_flat4_scratch)
linear_nvfp4.prepared["scratch"] = _ready_nvfp4_scratch
linear_mxfp8.prepared["scratch"] = _ready_mxfp8_scratch
linear_w4a8.prepared["scratch"] = _ready_w4a8_scratch
