"""Rows to INT8 with one pass over memory: read or decoded, rotated 256 by 256, q = round(v / s).

The kernel is rows.cu; here rows get their variant and their launch. kernels/triton/rows.py does the
same for other rotations and wherever this cannot run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..codebook4 import constant
from ..device import gpu_of
from ..scales import Geometry
from .compiler import Kernel, Launch, kernel
from .skinny import aligned

SOURCE = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
SPAN = 256
ARGUMENTS = struct.Struct("6PQ2I")
MOST_WARPS, CHUNKS = 16, 4  # of a block; chunks of 256 that a warp holds in registers
MOST = 2 * SPAN * MOST_WARPS * CHUNKS  # elements of a row: beyond, registers run out


class Stored(IntEnum):
    """How rows are stored; the value is what rows.cu calls STORED."""

    X16 = 0
    FLAT4 = 1
    NVFP4 = 2
    W4A8 = 3
    TILES8 = 4
    TILES9 = 5
    MXFP8 = 6


class Rows(NamedTuple):
    """Stored rows, ready to be launched over.

    pitch: bytes from row to row. across: scales in a row of their grid. group: elements along K
    that share a scale, and rows: rows that do; powers of two.
    """

    stored: Stored
    k: int
    tensor: torch.Tensor
    pitch: int
    scale: torch.Tensor
    whole: torch.Tensor
    levels: torch.Tensor
    across: int = 1
    group: int = 1
    rows: int = 1


def why_not_rows(tensor: torch.Tensor, k: int) -> str | None:
    """Why this kernel takes no rows of K elements; None when it does."""
    if k % SPAN or not 0 < k <= MOST:
        return f"K={k} is not made of {SPAN}s, up to {MOST}"
    gpu = gpu_of(tensor)
    if gpu.capability >= (8, 0):
        return None
    return f"{gpu.sm} is older than sm_80"


def warps_for(k: int) -> int:
    """Warps of a block that share a row."""
    return min(-(-k // (SPAN * CHUNKS)), MOST_WARPS)


def options(
    stored: Stored, k: int, dtype: torch.dtype, group: int, *, rotate: bool, float8: bool = False
) -> tuple[str, ...]:
    """Compiler options of one variant; `dtype` is that of activations, `float8` says what codes
    are made.
    """
    defined = {
        "STORED": int(stored),
        "CHUNKS": k // SPAN,
        "WARPS": warps_for(k),
        "SHIFT": group.bit_length() - 1,
        "ROTATE": int(rotate),
        "FLOAT8": int(float8),
    }
    flags = [f"-D{name}={value}" for name, value in defined.items()]
    if dtype == torch.bfloat16:
        return (*flags, "-DBF16")
    return tuple(flags)


@lru_cache(4096)
def entry_of(
    stored: Stored,
    k: int,
    dtype: torch.dtype,
    group: int,
    device: int,
    *,
    rotate: bool,
    float8: bool = False,
) -> Kernel:
    """The variant for these rows, on a device."""
    wanted = options(stored, k, dtype, group, rotate=rotate, float8=float8)
    return kernel(SOURCE, "make_rows", wanted, device)


def plain(x: torch.Tensor) -> Rows:
    """(M, K) bfloat16 or float16."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous().clone()
    return Rows(Stored.X16, x.shape[1], x, 2 * x.stride(0), x, x, x)


def flat4(
    packed: torch.Tensor, absmax: torch.Tensor, values: tuple[float, ...], group: int
) -> Rows:
    """(N, K/2) bytes, high nibble first, a float32 scale per `group` of a row."""
    half = packed.shape[1]
    table = constant(values, packed.device)
    across = 2 * half // group
    stored = (Stored.FLAT4, 2 * half, aligned(packed), half, absmax, absmax, table)
    return Rows(*stored, across=across, group=group)


def tiles(codes: torch.Tensor, scale: torch.Tensor, geometry: Geometry) -> Rows:
    """(N, K) 8-bit codes with a grid of float32 scales, several along K."""
    k, rows, group = codes.shape[1], geometry.rows, geometry.cols
    kind = Stored.TILES8 if codes.dtype == torch.int8 else Stored.TILES9
    scale = scale.contiguous()
    stored = (kind, k, aligned(codes), k, scale, scale, scale)
    return Rows(*stored, across=k // group, group=group, rows=rows)


def e2m1(
    packed: torch.Tensor, block: torch.Tensor, per_tensor: torch.Tensor, values: tuple[float, ...]
) -> Rows:
    """(N, K/2) bytes, high nibble first, swizzled e4m3fn scales of 16, one of all."""
    half = packed.shape[1]
    table = constant(values, packed.device)
    stored = (Stored.NVFP4, 2 * half, aligned(packed), half, block.contiguous(), per_tensor, table)
    return Rows(*stored, across=half // 8, group=16)


def w4a8(
    packed: torch.Tensor, relative: torch.Tensor, channel: torch.Tensor, levels: torch.Tensor
) -> Rows:
    """(N, K/2) bytes, low nibble first, e4m3fn scales of 16 in steps of `channel` (N,)."""
    half = packed.shape[1]
    scales = (relative.contiguous(), channel.contiguous(), levels)
    return Rows(Stored.W4A8, 2 * half, aligned(packed), half, *scales, across=half // 8, group=16)


def e4m3_mx(codes: torch.Tensor, exponent: torch.Tensor) -> Rows:
    """(N, K) e4m3fn codes, swizzled exponents of 32."""
    k = codes.shape[1]
    scale = exponent.contiguous()
    stored = (Stored.MXFP8, k, aligned(codes), k, scale, scale, scale)
    return Rows(*stored, across=k // 32, group=32)


def make(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, K) int8 codes and (M, 1) float32 scales, in memory as activations.quantize's."""
    tensor, k = rows.tensor, rows.k
    m, device = len(tensor), tensor.device
    codes = torch.empty((m, k), dtype=torch.int8, device=device)
    scales = torch.empty((1, -(-m // 4) * 4), dtype=torch.float32, device=device)
    launch(rows, codes.data_ptr(), scales.data_ptr())
    return codes, scales[:, :m].t()


def launch(rows: Rows, codes: int, scales: int) -> None:
    """Make INT8 rows at two addresses."""
    launch_of(rows)(codes, scales)


def launch_of(rows: Rows) -> Callable[[int, int], None]:
    """What makes INT8 rows at two addresses, those of the codes and of the scales."""
    tensor, k = rows.tensor, rows.k
    rotate, index = rows.stored != Stored.W4A8, tensor.device.index or 0
    entry = entry_of(rows.stored, k, tensor.dtype, rows.group, index, rotate=rotate)
    pointers = [part.data_ptr() for part in (tensor, rows.scale, rows.whole, rows.levels)]
    numbers = (rows.pitch, rows.across, rows.rows.bit_length() - 1)
    start = Launch(entry, (len(tensor), 1, 1), 32 * warps_for(k))

    def make(codes: int, scales: int) -> None:
        start(ARGUMENTS.pack(*pointers, codes, scales, *numbers))

    return make
