"""8-bit codes times 8-bit codes on the tensor cores: out = sum over K-groups of (x @ W.T) * x_scale
* w_scale, + bias.

INT8 products accumulate in int32, FP8 products in float32; each group's sum is scaled into a
float32 total.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..device import gpu_of
from ..levels import E4M3, INT8
from ..scales import Geometry
from . import activations
from .launch import launch
from .reduce import reduce_parts


@triton.jit
def _multiply(
    x, x_scale, w, w_scale, bias, out, m, n, k, per_split, xs_row, xs_group, ws_row, ws_group,
    GROUP: tl.constexpr, W_ROWS: tl.constexpr,
    INTEGER: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # Programs go through bands of BAND row tiles, so that those running together share their tiles
    # of W in L2.
    row_tiles, col_tiles = tl.cdiv(m, BM), tl.cdiv(n, BN)
    index = tl.program_id(0)
    first = index // (BAND * col_tiles) * BAND
    height = tl.minimum(row_tiles - first, BAND)
    inner = index % (BAND * col_tiles)
    rows = (first + inner % height) * BM + tl.arange(0, BM)
    cols = inner // height * BN + tl.arange(0, BN)
    start = tl.program_id(1) * per_split
    stop = tl.minimum(start + per_split, k)
    steps = tl.arange(0, BK)
    x_at = x + (rows % m)[:, None].to(tl.int64) * k + steps[None, :]
    w_at = w + (cols % n)[None, :].to(tl.int64) * k + steps[:, None]
    if GROUP == 0:
        total = tl.zeros((BM, BN), dtype=tl.int32 if INTEGER else tl.float32)
        for offset in range(start, stop, BK):
            if EVEN:
                a, b = tl.load(x_at + offset), tl.load(w_at + offset)
            else:
                a = tl.load(x_at + offset, (offset + steps < k)[None, :], other=0.0)
                b = tl.load(w_at + offset, (offset + steps < k)[:, None], other=0.0)
            total = tl.dot(a, b, total, out_dtype=total.dtype)
        sums = total.to(tl.float32) * tl.load(x_scale + (rows % m) * xs_row)[:, None]
        sums *= tl.load(w_scale + (cols % n) * ws_row)[None, :]
    else:
        sums = tl.zeros((BM, BN), dtype=tl.float32)
        xs_at = x_scale + (rows % m) * xs_row
        if W_ROWS % BN == 0:  # the whole tile lies in one row of scales
            ws_at = w_scale + (inner // height * BN // W_ROWS) * ws_row
        else:
            ws_at = w_scale + (cols % n) // W_ROWS * ws_row
        s, t = (
            tl.load(xs_at + start // GROUP * xs_group),
            tl.load(ws_at + start // GROUP * ws_group),
        )
        for offset in range(start, stop, BK):
            # The scales of the next step are on their way while the tensor cores work on this one.
            ahead = tl.minimum(offset + BK, stop - 1) // GROUP
            next_s, next_t = tl.load(xs_at + ahead * xs_group), tl.load(ws_at + ahead * ws_group)
            part = tl.dot(
                tl.load(x_at + offset),
                tl.load(w_at + offset),
                out_dtype=tl.int32 if INTEGER else tl.float32,
            )
            if W_ROWS % BN == 0:
                sums += part.to(tl.float32) * (s * t)[:, None]
            else:
                sums += part.to(tl.float32) * s[:, None] * t[None, :]
            s, t = next_s, next_t
    at = rows[:, None].to(tl.int64) * n + cols[None, :]
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    if SPLIT == 1:
        if BIAS:
            sums += tl.load(bias + cols % n).to(tl.float32)[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), inside)
    else:
        tl.store(out + tl.program_id(1).to(tl.int64) * m * n + at, sums, inside)


class Tile(NamedTuple):
    """Rows of x, rows of W and elements of K per program and step; warps, stages, runs along K, row
    tiles per band.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1
    band: int = 8


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    group: int | None,
    w_rows: int,
    tile: Tile,
) -> torch.Tensor:
    """(M, K) codes @ (N, K).T codes -> (M, N) `dtype`.

    Args:
        x_scale: (M, K / group), or (M, 1) without groups; any strides.
        w_scale: (N / w_rows, K / group) float32; w_rows = N for one scale.
        group: elements along K sharing scales, at least 64; None for the whole row.
    """
    m, k = x.shape
    n = w.shape[0]
    block_k = min(tile.k, group) if group else tile.k
    split = tile.split
    step = max(block_k, group or 0)
    per_split = -(-k // (split * step)) * step
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    parts = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    has_bias = bias is not None
    one_scale = w_scale.shape[0] == 1
    numbers = (
        m, n, k,
        per_split, x_scale.stride(0), x_scale.stride(1), 0 if one_scale else w_scale.stride(0),
        w_scale.stride(1), group or 0, 1 if one_scale else w_rows,
        w.dtype == torch.int8, has_bias, split,
        tile.m, tile.n, block_k, tile.band, k % block_k == 0,
    )  # fmt: skip
    tensors = (x, x_scale, w.contiguous(), w_scale, bias if has_bias else x_scale, parts)
    grid = (-(-m // tile.m) * -(-n // tile.n), split, 1)
    launch(_multiply, grid, tensors, *numbers, num_warps=tile.warps, num_stages=tile.stages)
    if split > 1:
        reduce_parts(parts, bias, out)
    return out


# kind of scales -> (most rows of x, tile), the first that fits; from
# tests/benchmarks/linear_sweep.py on an H200. 12288x3072 / 3072x12288, ms without the quantizer,
# the library's bf16 product in brackets:
#   INT8 row   M=16 .0138 / .0155, 256 .0280 / .0278, 1024 .0660 / .0690, 4608 .285 / .272   (.0225
# .029 .102 .439)
#   INT8 128   M=16 .0171 / .0168, 256 .0335 / .0353, 1024 .0924 / .0856, 4608 .397 / .403
#   INT8 64    M=16 .0201 / .0212, 256 .0383 / .0433, 1024 .129 / .126, 4608 .545 / .564
# FP8 is within 5 % of INT8, 64-blocks 8 % faster.
TILES = {
    "row": (
        (16, Tile(16, 64, 256, 4, 4)),
        (64, Tile(64, 32, 128, 4, 5)),
        (128, Tile(64, 64, 128, 4, 4)),
        (512, Tile(64, 128, 128, 4, 4)),
        (None, Tile(128, 128, 128, 8, 3, band=16)),
    ),
    "128": (
        (16, Tile(16, 64, 128, 4, 4)),
        (512, Tile(64, 64, 128, 4, 3)),
        (None, Tile(64, 128, 128, 4, 3)),
    ),
    "64": (
        (16, Tile(16, 64, 64, 4, 5)),
        (64, Tile(64, 64, 64, 4, 4)),
        (None, Tile(128, 64, 64, 4, 3)),
    ),
}
# elements of K that a program keeps at least when K is split
MIN_RUN = {"row": 2048, "128": 1536, "64": 768}
PROGRAMS_PER_SM = 3


def tile_for(m: int, n: int, k: int, group: int | None, sms: int) -> Tile:
    """The fastest tile of the sweep, K split where tiles are few and runs stay long."""
    if group is None:
        kind = "row"
    else:
        kind = "64" if group < 128 else "128"
    tile = next(tile for most, tile in TILES[kind] if most is None or m <= most)
    programs, split = -(-m // tile.m) * -(-n // tile.n), 1
    while programs * split * 2 <= PROGRAMS_PER_SM * sms and k >= MIN_RUN[kind] * split * 2:
        split *= 2
    return tile._replace(split=split)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
) -> torch.Tensor:
    """(M, K) floats @ (N, K).T + bias in x's dtype, x quantized to the codes' kind with the
    weight's groups along K.
    """
    levels = INT8 if codes.dtype == torch.int8 else E4M3
    x_codes, x_scale = activations.quantize(x, levels, geometry.cols)
    n = len(codes)
    if geometry.cols is None and geometry.rows == 1:
        return rows_product(x_codes, x_scale, codes, scale, bias, x.dtype)
    if geometry.rows == 1 and geometry.cols and len(x) > 64:
        scale = scale.t().contiguous().t()  # every step reads one column of it
    tile = tile_for(len(x), n, x.shape[1], geometry.cols, gpu_of(x).multiprocessors)
    return multiply(
        x_codes, x_scale, codes, scale, bias, x.dtype, geometry.cols, geometry.rows or n, tile
    )


def rows_product(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(M, K) codes @ (N, K).T codes + bias -> (M, N) `dtype`, a scale per row of both."""
    m, k = x_codes.shape
    tile = tile_for(m, len(codes), k, None, gpu_of(x_codes).multiprocessors)
    return multiply(x_codes, x_scale, codes, scale, bias, dtype, None, 1, tile)
