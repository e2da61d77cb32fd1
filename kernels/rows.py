"""Rows as INT8: activations, and stored weights that are multiplied as such; both may be rotated.

A product of rows rotated alike is the product of the rows themselves, and no channel that is far
larger than the others takes the steps of its whole row. W is decoded and rounded anew at each call
into memory that a product then reads: its bytes stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from .activations import quantize_activations
from .codebook4 import E2M1, FlatGrid
from .cuda import rows as cuda
from .cuda import why_not_cuda
from .dispatch import Op, op
from .grids import decode
from .hadamard import rotate
from .levels import INT8, Levels, code_values
from .mxfp8 import BLOCK as MX_BLOCK
from .mxfp8 import Mxfp8Grid
from .nvfp4 import BLOCK as NV_BLOCK
from .nvfp4 import Nvfp4Grid, Nvfp4Scale
from .packing import unpack_nibbles, unswizzle_scales
from .scales import Geometry
from .triton import why_not_triton
from .w4a8 import int8_values

SPANS = (256, 64, 16)  # columns rotated together
MOST = 32768  # elements of a row that a kernel holds

Rows = tuple[torch.Tensor, torch.Tensor]  # (M, K) int8, (M, 1) float32


def span_of(k: int) -> int | None:
    """The widest rotation for rows of K; None where none fits."""
    return next((span for span in SPANS if k % span == 0), None)


def why_not_rows(tensor: torch.Tensor, k: int, span: int | None) -> str | None:
    """Why no kernel makes INT8 rows of this; None when one does."""
    reason = why_not_triton(tensor)
    if reason:
        return reason
    if span is None:
        return f"K={k} is not divided by {SPANS[-1]}"
    if span not in SPANS or k % span:
        return f"K={k} is not rotated by {span}"
    if k > MOST:
        return f"K={k} > {MOST}"
    return None


@lru_cache(4096)
def _by_cuda(k: int, span: int, device: torch.device) -> bool:
    """Whether kernels/cuda/rows.py takes rows of K; else kernels/triton/rows.py does."""
    probe = torch.empty(1, dtype=torch.int8, device=device)
    return span == cuda.SPAN and not (why_not_cuda(probe) or cuda.why_not_rows(probe, k))


def make(kind: str, k: int, span: int, *stored: object) -> Rows:
    """INT8 rows of (rotated) rows of K on a GPU, by the faster of two kernels.

    Args:
        kind, stored: a function that both kernels' modules have, and its arguments.
    """
    if _by_cuda(k, cuda.SPAN if kind == "w4a8" else span, stored[0].device):
        return cuda.make(getattr(cuda, kind)(*stored))
    from .triton import rows

    if kind == "w4a8":  # is INT8 already
        return rows.w4a8(*stored)
    return rows.quantize(getattr(rows, kind)(*stored), span)


def _backends(made: Op, kind: str, why_not: Callable, inputs: Callable) -> None:
    """Register both kernels for an op; `inputs` makes (K, span, stored) of the op's arguments."""

    def why_not_native(*args: object) -> str | None:
        k, span, stored = inputs(*args)
        if span != cuda.SPAN:
            return f"rows are rotated by {cuda.SPAN}, not by {span}"
        return why_not(*args) or why_not_cuda(stored[0]) or cuda.why_not_rows(stored[0], k)

    def native(*args: object) -> Rows:
        return cuda.make(getattr(cuda, kind)(*inputs(*args)[2]))

    def triton(*args: object) -> Rows:
        from .triton import rows

        _, span, stored = inputs(*args)
        if kind == "w4a8":
            return rows.w4a8(*stored)
        return rows.quantize(getattr(rows, kind)(*stored), span)

    made.order = lambda *args: [("cuda", "reads and writes once"), ("triton", "")]
    made.backend("cuda", why_not_native)(native)
    made.backend("triton", why_not)(triton)


@op
def quantize_rotated(x: torch.Tensor, span: int) -> Rows:
    """INT8 rows of x, rotated `span` by `span` first; never rounded in between.

    Args:
        x: (M, K) float32, float16 or bfloat16.

    Returns:
        codes (M, K), scale (M, 1): as `quantize_activations` gives them. A row with NaN or
        infinity gets a scale that is not finite.
    """
    return quantize_activations.eager(rotate(x, span), INT8, None)


def why_not_floats(x: torch.Tensor) -> str | None:
    """Why no kernel rotates activations of this dtype; None when one does."""
    halves = x.dtype in (torch.float16, torch.bfloat16)
    if halves:
        return None
    return "float32 input: a kernel rotates 16-bit floats"


def _why_not_quantize(x: torch.Tensor, span: int) -> str | None:
    return why_not_rows(x, x.shape[1], span) or why_not_floats(x)


_backends(quantize_rotated, "plain", _why_not_quantize, lambda x, span: (x.shape[1], span, (x,)))


@op
def rows_flat4(
    packed: torch.Tensor, absmax: torch.Tensor, levels: Levels, group: int, span: int
) -> Rows:
    """INT8 rows of a rotated weight of 4-bit codes, from what `dequantize_flat4` takes."""
    codes = unpack_nibbles(packed, high_first=True)
    return quantize_rotated.eager(FlatGrid(levels, group).decode(codes, absmax), span)


def why_not_flat4(packed, absmax, levels, group, span) -> str | None:
    """Why no kernel makes INT8 rows of these 4-bit codes; None when one does."""
    k = 2 * packed.shape[1]
    if k % group or group & (group - 1) or not 16 <= group <= 1024:
        return f"groups of {group} in K={k}"
    return why_not_rows(packed, k, span)


_backends(
    rows_flat4,
    "flat4",
    why_not_flat4,
    lambda packed, absmax, levels, group, span: (
        2 * packed.shape[1],
        span,
        (packed, absmax, code_values(levels), group),
    ),
)


@op
def rows_tiles(
    codes: torch.Tensor, scale: torch.Tensor, levels: Levels, geometry: Geometry, span: int
) -> Rows:
    """INT8 rows of a rotated weight of 8-bit codes with scales along K."""
    return quantize_rotated.eager(decode(codes, scale, levels, geometry), span)


def why_not_tiles(codes, scale, levels, geometry, span) -> str | None:
    """Why no kernel makes INT8 rows of these 8-bit codes; None when one does."""
    cols = geometry.cols
    if cols is None or geometry.rows is None or cols & (cols - 1) or not 16 <= cols <= 1024:
        return f"tiles of {geometry.rows} x {cols}"
    return why_not_rows(codes, codes.shape[1], span)


_backends(
    rows_tiles,
    "tiles",
    why_not_tiles,
    lambda codes, scale, levels, geometry, span: (codes.shape[1], span, (codes, scale, geometry)),
)


@op
def dequantize_nvfp4(
    packed: torch.Tensor, block: torch.Tensor, per_tensor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K/2) bytes, the high nibble first, swizzled e4m3fn scales of 16 and one float32 -> (N, K)
    `dtype`; N and K are not padded.
    """
    codes = unpack_nibbles(packed, high_first=True)
    n, k = codes.shape
    plain = unswizzle_scales(block.view(torch.uint8), n, k // NV_BLOCK).contiguous()
    scale = Nvfp4Scale(per_tensor, plain.view(torch.float8_e4m3fn))
    return Nvfp4Grid().decode(codes, scale).to(dtype)


@op
def rows_nvfp4(
    packed: torch.Tensor, block: torch.Tensor, per_tensor: torch.Tensor, span: int
) -> Rows:
    """INT8 rows of a rotated NVFP4 weight."""
    return quantize_rotated.eager(
        dequantize_nvfp4.eager(packed, block, per_tensor, torch.float32), span
    )


@dequantize_nvfp4.backend(
    "triton", lambda packed, *rest: why_not_rows(packed, 2 * packed.shape[1], SPANS[-1])
)
def _dequantize_nvfp4(packed, block, per_tensor, dtype):
    from .triton import rows

    return rows.decode(rows.e2m1(packed, block, per_tensor, code_values(E2M1)), dtype)


_backends(
    rows_nvfp4,
    "e2m1",
    lambda packed, block, per_tensor, span: why_not_rows(packed, 2 * packed.shape[1], span),
    lambda packed, block, per_tensor, span: (
        2 * packed.shape[1],
        span,
        (packed, block, per_tensor, code_values(E2M1)),
    ),
)


@op
def dequantize_mxfp8(
    codes: torch.Tensor, exponent: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """(N, K) e4m3fn codes and swizzled exponents of 32 -> (N, K) `dtype`; N and K are not
    padded.
    """
    n, k = codes.shape
    plain = unswizzle_scales(exponent.view(torch.uint8), n, k // MX_BLOCK)
    return Mxfp8Grid().decode(codes, plain).to(dtype)


@op
def rows_mxfp8(codes: torch.Tensor, exponent: torch.Tensor, span: int) -> Rows:
    """INT8 rows of a rotated MXFP8 weight."""
    return quantize_rotated.eager(dequantize_mxfp8.eager(codes, exponent, torch.float32), span)


@dequantize_mxfp8.backend(
    "triton", lambda codes, *rest: why_not_rows(codes, codes.shape[1], SPANS[-1])
)
def _dequantize_mxfp8(codes, exponent, dtype):
    from .triton import rows

    return rows.decode(rows.e4m3_mx(codes, exponent), dtype)


_backends(
    rows_mxfp8,
    "e4m3_mx",
    lambda codes, exponent, span: why_not_rows(codes, codes.shape[1], span),
    lambda codes, exponent, span: (codes.shape[1], span, (codes, exponent)),
)


@op
def rows_w4a8(
    packed: torch.Tensor, relative: torch.Tensor, channel: torch.Tensor, levels: torch.Tensor
) -> Rows:
    """INT8 rows of a W4A8 weight: exact, of the weight as it was rotated when it was made.

    Returns:
        codes (N, K), scale (N, 1): the stored `channel`, NaN for a row with a NaN scale.
    """
    bad = relative.float().isnan().any(1)
    return int8_values(packed, relative, levels), channel.masked_fill(bad, torch.nan)[:, None]


_backends(
    rows_w4a8,
    "w4a8",
    lambda packed, *rest: why_not_rows(packed, 2 * packed.shape[1], SPANS[-1]),
    lambda packed, *rest: (2 * packed.shape[1], cuda.SPAN, (packed, *rest)),
)
