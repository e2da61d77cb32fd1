"""x @ W.T for few rows of x: W's codes go from memory through registers into tensor cores, decoded
on the way.

The kernel is skinny.cu; here a product gets its variant, its share of work and its launch.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..device import Gpu, gpu_of
from ..kinds import Codes
from .compiler import Kernel, kernel

SOURCE = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")

ARGUMENTS = struct.Struct("5P6I")
STAGE_BYTES = 16 * 128  # of a warp: 128 bytes of each of its rows
TABLE_BYTES = 256 * 32 * 4  # of a 4-bit kernel: 256 pairs, once per bank


class Work(NamedTuple):
    """How a product is shared out.

    tokens: rows of x a warp multiplies; rows: warps of a block side by side, 16 rows of W each;
    split: warps of a block, and cluster: blocks, that share the K of a row; stages: of a warp's
    ring, one being multiplied.
    """

    tokens: int
    rows: int
    split: int
    cluster: int
    stages: int


@cache
def _table(values: tuple[float, ...], dtype: torch.dtype) -> tuple[str, ...]:
    """The 16 values as two tables of bytes, four per register: L0..L3 the low bytes, H0..H3 the
    high ones.
    """
    bits = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.uint8).view(16, 2)
    low, high = (bits[:, byte].contiguous().view(torch.int32).tolist() for byte in (0, 1))
    planes = {f"L{i}": word for i, word in enumerate(low)}
    planes.update({f"H{i}": word for i, word in enumerate(high)})
    return tuple(f"-D{name}={word & 0xFFFFFFFF:#x}u" for name, word in planes.items())


def options(
    codes: torch.dtype,
    dtype: torch.dtype,
    group: int | None,
    even: bool,
    work: Work,
    values: tuple[float, ...] | None = None,
) -> tuple[str, ...]:
    """Compiler options of one variant; `even`: `_even`; `values` are the 16 of a 4-bit code."""
    defined = {
        "KIND": int(Codes.of(codes)),
        "LANE": _lane(group),
        "GROUPED": group or 0,
        "EVEN": int(even),
        **{name.upper(): value for name, value in work._asdict().items()},
    }
    flags = [f"-D{name}={value}" for name, value in defined.items()]
    if dtype == torch.bfloat16:
        flags.append("-DBF16")
    return (*flags, *(_table(values, dtype) if values else ()))


def _bits(codes: torch.dtype) -> int:
    """Of a code: two of 4 bits are packed in a byte."""
    if codes == torch.uint8:
        return 4
    return 8


def _stage_codes(codes: torch.dtype) -> int:
    """Codes of a row in a stage."""
    return 1024 // _bits(codes)


def _even(codes: torch.dtype, group: int | None, k: int) -> bool:
    """Whether every stage has its own whole groups, so that their scales are read at once."""
    return group is not None and _stage_codes(codes) >= group and k % _stage_codes(codes) == 0


def _lane(group: int | None) -> int:
    """Consecutive codes of a lane."""
    if group == 32:
        return 8
    return 16


def shared_bytes(codes: torch.dtype, work: Work) -> int:
    """Shared memory of a block: sums, what is in flight, the table."""
    table = TABLE_BYTES if _bits(codes) == 4 else 0
    x_bytes = 2 * work.tokens * _stage_codes(codes)
    warps, tiles = work.rows * work.split, -(-work.tokens // 8)
    return work.stages * (warps * STAGE_BYTES + work.split * x_bytes) + 512 * warps * tiles + table


def tokens_for(m: int) -> int:
    """Rows of x that one warp takes."""
    return min(1 << (m - 1).bit_length(), 64)


# (most rows of x, work for each of LEAST_ROWS), as (rows, split, cluster, stages): the best over
# 12288x3072, over 3072x12288, 3072x15360, 3072x3072 and 5120x13824, and for 1280x1280 on an H200 in
# tests/benchmarks/linear_sweep.py. ms for 12288x3072 / 3072x12288, the library's bf16 product in
# brackets:
#   nf4 64     M=1 .0096 / .0103 (.022 .023), 16 .0130 / .0164, 32 .022 / .025, 64 .041 / .043 (.023
# .026)
#   int8 row   M=1 .0128 / .0127, 16 .0141 / .0149, 32 .017 / .021, 64 .026 / .029
LEAST_ROWS = (8192, 2048, 0)  # rows of W
WORK = {
    4: (
        (4, (2, 2, 1, 2), (1, 4, 2, 2), (1, 8, 1, 2)),
        (8, (2, 2, 1, 2), (2, 4, 1, 2), (1, 8, 1, 2)),
        (16, (4, 1, 2, 2), (2, 4, 1, 2), (1, 8, 1, 2)),
        (32, (8, 1, 2, 2), (4, 2, 2, 2), (2, 2, 2, 3)),
        (64, (4, 2, 2, 2), (4, 2, 2, 2), (2, 2, 2, 2)),
    ),
    8: (
        (8, (2, 4, 1, 2), (1, 8, 2, 2), (1, 4, 1, 3)),
        (16, (2, 2, 1, 3), (1, 4, 2, 2), (1, 4, 1, 2)),
        (32, (2, 2, 1, 2), (4, 4, 2, 2), (2, 2, 2, 2)),
        (64, (4, 1, 2, 2), (4, 2, 2, 2), (2, 2, 2, 2)),
    ),
}


@cache
def work_for(tokens: int, n: int, codes: torch.dtype, gpu: Gpu) -> Work:
    """How a GPU shares out a product: what was measured, within what it has."""
    measured = next(sizes for most, *sizes in WORK[_bits(codes)] if tokens <= most)
    sizes = next(size for least, size in zip(LEAST_ROWS, measured) if n >= least)
    work = Work(tokens, *sizes)
    if not gpu.clusters:
        work = work._replace(cluster=1, split=min(work.split * work.cluster, 16 // work.rows))
    while shared_bytes(codes, work) > gpu.shared_bytes:
        work = _smaller(work)
    return work


def _smaller(work: Work) -> Work:
    """Half as many warps while there are more than 4, then half as many rows of x."""
    if work.rows * work.split > 4:
        half = "rows" if work.rows > work.split else "split"
        return work._replace(**{half: getattr(work, half) // 2})
    return work._replace(tokens=work.tokens // 2)


def why_not_shape(m: int, k: int, group: int | None, dtype: torch.dtype) -> str | None:
    """Why this kernel cannot multiply this shape; None when it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} input: the tensor cores would round it"
    span = 4 * _lane(group)
    if group is not None and group % span:
        return f"groups of {group} are narrower than {span}"
    if k % (group or span):
        return f"K={k} is not a multiple of {group or span}"
    return None


@cache
def _entry(
    device: int,
    codes: torch.dtype,
    dtype: torch.dtype,
    group: int | None,
    even: bool,
    work: Work,
    values: tuple | None,
) -> Kernel:
    wanted = options(codes, dtype, group, even, work, values)
    return kernel(SOURCE, "multiply", wanted, device, shared_bytes(codes, work))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, at an address that 16-byte loads can take."""
    tensor = tensor.contiguous()
    if tensor.data_ptr() % 16:
        return tensor.clone()
    return tensor


def plan_for(
    x: torch.Tensor,
    codes: torch.Tensor,
    group: int | None,
    rows_per_scale: int,
    values: tuple[float, ...] | None = None,
    work: Work | None = None,
) -> tuple[Kernel, tuple[int, int, int], int, int, int]:
    """(kernel, grid, threads of a block, shift from a row of W to its scale, groups along K)."""
    (m, k), n = x.shape, len(codes)
    work = work or work_for(tokens_for(m), n, codes.dtype, gpu_of(x))
    even = _even(codes.dtype, group, k)
    entry = _entry(x.device.index or 0, codes.dtype, x.dtype, group, even, work, values)
    grid = (-(-n // (16 * work.rows)) * work.cluster, -(-m // work.tokens), 1)
    shift = 31 if rows_per_scale >= n else rows_per_scale.bit_length() - 1
    return entry, grid, 32 * work.rows * work.split, shift, k // group if group else 1


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group: int | None,
    rows_per_scale: int,
    values: tuple[float, ...] | None = None,
    work: Work | None = None,
) -> torch.Tensor:
    """(M, K) bf16 or fp16 @ W.T + bias -> (M, N) of x's dtype, summed in float32.

    Args:
        codes: (N, K) int8 or float8_e4m3fn, or (N, K/2) uint8 with the high nibble first.
        scale: float32, row-major (N / rows_per_scale, K / group).
        rows_per_scale: of W: a power of two, or N for one scale.
        group: elements along K sharing a scale: 32 or a multiple of 64; None for all.
        values: of the 16 codes of 4 bits.
    """
    m, k = x.shape
    n = len(codes)
    x, codes = aligned(x), aligned(codes)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    entry, grid, threads, shift, groups = plan_for(x, codes, group, rows_per_scale, values, work)
    has_bias = bias is not None
    pointers = (t.data_ptr() for t in (x, codes, scale, bias if has_bias else scale, out))
    entry.launch(grid, threads, ARGUMENTS, *pointers, m, n, k, shift, groups, has_bias)
    return out
