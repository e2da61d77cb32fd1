"""Products that are ready but for x and the bias: what a layer calls again and again.

All that depends on shapes and on the weight is found once. A call takes what is left: two
allocations, the addresses, one to three launches. Microseconds of Python are in docs/speed.md.

x is (..., K) with as many rows as it had when the product was made ready; the result is (..., N). A
product knows a weight's tensors by address; `keeps` are those that it made itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kinds import Codes
from . import rows, skinny, wide
from .compiler import Launch

Ready = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def _place(m: int, k: int) -> tuple[int, int]:
    """Bytes from the codes of M rows to their scales, and of both, in multiples of 256."""
    codes = -(-m * k // 256) * 256
    return codes, codes + -(-m // 64) * 256


def _fits(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels read it: contiguous, at an address that 16-byte loads can take."""
    x = x.contiguous()
    if x.data_ptr() % 16:
        return x.clone()
    return x


def _made(needed: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...]) -> tuple:
    """The needed tensors that lie in memory of their own."""
    addresses = {tensor.data_ptr() for tensor in given}
    return tuple(tensor for tensor in needed if tensor.data_ptr() not in addresses)


def _make_x(m: int, k: int, dtype: torch.dtype, device: int, *, rotate: bool, float8: bool):
    """A launch that quantizes M contiguous rows of floats from an address to two others."""
    entry = rows.entry_of(rows.Stored.X16, k, dtype, 1, device, rotate=rotate, float8=float8)
    start = Launch(entry, (m, 1, 1), 32 * rows.warps_for(k))
    pitch, pack = 2 * k, rows.ARGUMENTS.pack

    def make(x: int, codes: int, scales: int) -> None:
        start(pack(x, x, x, x, codes, scales, pitch, 1, 0))

    return make


def _multiply(
    m: int,
    codes: torch.Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: int,
    kind: Codes,
    rows_per_scale: int,
):
    """A launch of wide.cu over codes of x and of W with a scale per row; `codes`: W's, or None
    where their address is known only then.
    """
    n, k = shape
    scaling = wide.Scaling(kind, None, rows_per_scale)
    plan = wide.plan_for(scaling, (m, n, k), dtype, device, values=None, tile=None)
    stored = torch.int8 if kind == Codes.INT8 else torch.float8_e4m3fn
    start, pack = Launch(plan.entry, plan.grid, plan.threads), wide.ARGUMENTS.pack
    map_of, shift, x_box, w_box = wide.map_of, plan.shift, plan.x_box, plan.w_box
    w_map = codes is not None and map_of(codes.data_ptr(), stored, n, k, k, w_box, True)

    def multiply(x_codes, x_scale, w_codes, w_scale, bias, out) -> None:
        x_map = map_of(x_codes, stored, m, k, k, x_box, True)
        left = w_map or map_of(w_codes, stored, n, k, k, w_box, True)
        bias_at = w_scale if bias is None else bias.data_ptr()
        pointers = (x_scale, w_scale, bias_at, out)
        start(pack(left, x_map, x_map, *pointers, m, n, k, bias is not None, shift, 1, 0))

    return multiply


def quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    rows_per_scale: int,
    *,
    rotate: bool,
) -> Ready:
    """x quantized to rows of the weight's kind of codes, then multiplied by wide.cu."""
    (m, k), n, device = x.shape, len(codes), x.device
    kind, index, dtype = Codes.of(codes.dtype), device.index or 0, x.dtype
    given, codes, scale_at = (codes,), skinny.aligned(codes), scale.data_ptr()
    make = _make_x(m, k, dtype, index, rotate=rotate, float8=kind == Codes.FP8)
    multiply = _multiply(m, codes, (n, k), dtype, index, kind, rows_per_scale)
    to_scales, total = _place(m, k)
    halves = total // 2  # memory is asked for in x's dtype: to name another takes longer

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = _fits(x)
        scratch = x.new_empty(halves)
        out = x.new_empty((*x.shape[:-1], n))
        at = scratch.data_ptr()
        make(x.data_ptr(), at, at + to_scales)
        multiply(at, at + to_scales, 0, scale_at, bias, out.data_ptr())
        return out

    run.keeps = _made((codes,), given)
    return run


def scratch(
    x: torch.Tensor, stored: rows.Rows, n: int, given: tuple[torch.Tensor, ...], *, rotate: bool
) -> Ready:
    """W as it is stored made INT8 rows, x too, then multiplied by wide.cu; `rotate`: both are
    rotated 256 by 256. `given`: what `stored` was made of.
    """
    (m, k), device, dtype = x.shape, x.device, x.dtype
    index = device.index or 0
    make = _make_x(m, k, dtype, index, rotate=rotate, float8=False)
    make_w = rows.launch_of(stored)
    multiply = _multiply(m, None, (n, k), dtype, index, Codes.INT8, 1)
    to_scales, x_bytes = _place(m, k)
    to_w_scales, w_bytes = _place(n, k)
    to_w_scales += x_bytes
    halves = (x_bytes + w_bytes) // 2

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = _fits(x)
        memory = x.new_empty(halves)
        out = x.new_empty((*x.shape[:-1], n))
        at = memory.data_ptr()
        make_w(at + x_bytes, at + to_w_scales)
        make(x.data_ptr(), at, at + to_scales)
        multiply(at, at + to_scales, at + x_bytes, at + to_w_scales, bias, out.data_ptr())
        return out

    run.keeps = _made((stored.tensor, stored.scale, stored.whole), given)
    return run


def as_it_is(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    group: int | None,
    rows_per_scale: int,
    values: tuple[float, ...] | None = None,
) -> Ready:
    """Few rows of x by skinny.cu."""
    (m, k), n = x.shape, len(codes)
    given, codes = (codes,), skinny.aligned(codes)
    entry, grid, threads, shift, groups = skinny.plan_for(x, codes, group, rows_per_scale, values)
    codes_at, scale_at, pack = codes.data_ptr(), scale.data_ptr(), skinny.ARGUMENTS.pack
    start = Launch(entry, grid, threads)

    def run(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = _fits(x)
        out = x.new_empty((*x.shape[:-1], n))
        bias_at = scale_at if bias is None else bias.data_ptr()
        pointers = (x.data_ptr(), codes_at, scale_at, bias_at, out.data_ptr())
        start(pack(*pointers, m, n, k, shift, groups, bias is not None))
        return out

    run.keeps = _made((codes,), given)
    return run
