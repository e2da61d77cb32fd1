"""x @ W.T for many rows of x on Hopper, whose tensor cores read shared memory themselves, fed by
its copy engine (TMA).

The kernel is wide.cu; here a product gets its variant, its tiles and its launch.
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .compiler import Kernel, encode_tensor_map, kernel
from .skinny import KINDS, aligned

SOURCE = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
CAPABILITY = 9, 0  # wgmma and setmaxnreg are sm_90a's alone
ARGUMENTS = struct.Struct("128s128s128s4P7I4x")
STEP = {4: 64, 8: 128, 9: 128}  # elements of K in a stage
SHARED_BYTES = 227 * 1024
TABLE_BYTES = 256 * 128  # of a 4-bit code: the pair of each byte, once per 8 bytes of the banks
OUT_BYTES = 5120  # of a group of warps: output on its way


class Tile(NamedTuple):
    """How a product is shared out.

    right: rows of the right factor that a block multiplies; groups: of four warps, 64 rows of the
    left each; stages: of its ring; split: blocks that share K.
    """

    right: int
    groups: int
    stages: int
    split: int = 1

    def needed(self, left: int, right: int) -> int:
        """How many cover a product of so many rows of the left and of the right factor."""
        return -(-left // (64 * self.groups)) * -(-right // self.right)


class Cost(NamedTuple):
    """Microseconds of a block on an H200: per stage, and per tile for filling the ring and writing
    the output.
    """

    stage: float
    tile: float


# Fitted to 12288x3072, 3072x12288, 3072x15360, 3072x3072, 1280x1280 and 5120x13824 at M = 64 to
# 4608: the tile chosen by them was on average within 1-2 % of the best of all
# (tests/benchmarks/linear_sweep.py). Where groups along K have scales, totals lie beside the sums,
# and registers suffice for 128 x 128.
COSTS = {
    "row": {
        Tile(64, 2, 6): Cost(0.25, 2.1), Tile(64, 3, 6): Cost(0.31, 3.3), Tile(128, 2, 5): Cost(0.34, 3.4),
        Tile(128, 3, 5): Cost(0.485, 4.4), Tile(256, 2, 4): Cost(0.645, 5.3),
    },
    "4-bit": {
        Tile(64, 2, 6): Cost(0.413, 2.4), Tile(64, 3, 6): Cost(0.54, 3.3), Tile(128, 2, 5): Cost(0.493, 3.2),
        Tile(128, 3, 5): Cost(0.768, 4.8), Tile(256, 2, 5): Cost(0.712, 4.6),
    },
    "tiles": {Tile(64, 2, 6): Cost(0.322, 1.6), Tile(128, 2, 5): Cost(0.421, 3.2)},
    "groups": {Tile(64, 2, 6): Cost(0.454, 1.9), Tile(128, 2, 5): Cost(0.689, 2.9)},
}  # fmt: skip
# Share of the multiprocessors that clusters of so many blocks can fill, as measured: each lies in
# one part of the GPU. To cut K into as many pieces as there are multiprocessors and hand sums on
# through memory was tried: that took 9 us where a cluster takes 4.
SPLITS = {1: 1.0, 2: 0.95, 3: 0.82, 4: 0.85, 6: 0.73}
SPLIT_COST = 2.0, 0.6  # us: to add sums of several blocks, and per block


def _parts(kind: int, group: int | None) -> int:
    """Groups of K with 8-bit scales of their own in a stage."""
    return STEP[kind] // group if group and kind != 4 else 0


def _x_left(kind: int, group: int | None, rows_per_scale: int) -> bool:
    """Whether x is the left factor: where rows of W share the scales of groups along K."""
    return bool(_parts(kind, group)) and rows_per_scale % 64 == 0


def shared_bytes(kind: int, group: int | None, x_left: bool, tile: Tile) -> int:
    """Shared memory of a block: stages, or sums to add; table of a 4-bit code; output; barriers."""
    row, table = (32, TABLE_BYTES) if kind == 4 else (128, 0)
    stage = (
        tile.right * 128
        + 64 * tile.groups * row
        + (0 if x_left else _parts(kind, group) * tile.right * 4)
    )
    ring = max(tile.stages * stage, tile.right * tile.groups * 256 if tile.split > 1 else 0)
    return 1024 + ring + 16 * tile.stages + table + tile.groups * OUT_BYTES


def cost_family(kind: int, group: int | None, x_left: bool) -> str:
    """The name in `COSTS` of a kind of codes and scales."""
    return "4-bit" if kind == 4 else "row" if not group else "tiles" if x_left else "groups"


@cache
def tile_for(
    kind: int, group: int | None, x_left: bool, m: int, n: int, k: int, multiprocessors: int
) -> Tile:
    """The tile of least estimated time."""
    family, steps = cost_family(kind, group, x_left), -(-k // STEP[kind])
    rows = (m, n) if x_left else (n, m)

    def microseconds(tile: Tile) -> float:
        cost = COSTS[family][tile._replace(split=1)]
        if tile.split == 1:
            return -(-tile.needed(*rows) // multiprocessors) * (steps * cost.stage + cost.tile)
        adding = SPLIT_COST[0] + SPLIT_COST[1] * tile.split
        return -(-steps // tile.split) * cost.stage + cost.tile + adding

    wanted = (tile._replace(split=split) for tile in COSTS[family] for split in SPLITS)
    fitting = (
        tile for tile in wanted
        if tile.split == 1 or tile.needed(*rows) * tile.split <= multiprocessors * SPLITS[tile.split]
    )  # fmt: skip
    return min(fitting, key=microseconds)


def _instruction(kind: int, dtype: torch.dtype, width: int) -> str:
    """The function that multiplies 64 rows of the left factor by `width` of the right: an operand
    per sum of a lane.
    """
    sums = width // 2
    float16 = "bf16" if dtype == torch.bfloat16 else "f16"
    name, extra = {
        4: (f"m64n{width}k16.f32.{float16}.{float16}", ", p, 1, 1, 0"),
        8: (f"m64n{width}k32.s32.s8.s8", ", p"),
        9: (f"m64n{width}k32.f32.e4m3.e4m3", ", p, 1, 1"),
    }[kind]
    outs = ", ".join(f"%{i}" for i in range(sums))
    tied = ", ".join(f'"+{"r" if kind == 8 else "f"}"(d[{i}])' for i in range(sums))
    if kind == 4:  # the left factor in registers
        parameter, inputs = "const u32* a", [f'"r"(a[{i}])' for i in range(4)]
        left = f"{{%{sums}, %{sums + 1}, %{sums + 2}, %{sums + 3}}}"
    else:
        parameter, inputs, left = "u64 a", ['"l"(a)'], f"%{sums}"
    right = sums + len(inputs)
    return (
        f"DEVICE void mma(Sum (&d)[{sums}], {parameter}, u64 b, int add) {{\n"
        f'  asm volatile("{{.reg .pred p; setp.ne.u32 p, %{right + 1}, 0;\\n"\n'
        f'    "wgmma.mma_async.sync.aligned.{name} {{{outs}}}, {left}, %{right}{extra};}}"\n'
        f'    : {tied} : {", ".join(inputs)}, "l"(b), "r"(add));\n}}\n'
    )


def source(kind: int, dtype: torch.dtype, tile: Tile) -> str:
    """CUDA C++ of one variant, but for its options."""
    head, tail = SOURCE.split("//@", 1)
    return f"{head}{_instruction(kind, dtype, tile.right)}//{tail}"


def options(
    kind: int,
    dtype: torch.dtype,
    group: int | None,
    x_left: bool,
    same: bool,
    tile: Tile,
    values: tuple[float, ...] | None = None,
) -> tuple[str, ...]:
    """Compiler options; `same`: all rows of W in a tile share their scales; `values`: the 16 of a
    4-bit code.
    """
    bits = torch.tensor(values or (), dtype=torch.float32).view(torch.int32).tolist()
    return (
        f"-DKIND={kind}", f"-DGROUPED={group or 0}", f"-DX_LEFT={int(x_left)}", f"-DSAME_SCALE={int(same)}",
        *(f"-D{name.upper()}={value}" for name, value in tile._asdict().items()),
        *(("-DBF16",) if dtype == torch.bfloat16 else ()),
        *((f"-DVALUES={','.join(f'{b & 0xFFFFFFFF:#x}u' for b in bits)}",) if values else ()),
    )  # fmt: skip


@cache
def _entry(
    device: int,
    kind: int,
    dtype: torch.dtype,
    group: int | None,
    x_left: bool,
    same: bool,
    tile: Tile,
    values: tuple[float, ...] | None,
) -> Kernel:
    wanted = options(kind, dtype, group, x_left, same, tile, values)
    return kernel(
        source(kind, dtype, tile),
        "multiply_wide",
        wanted,
        device,
        shared_bytes(kind, group, x_left, tile),
    )


# addresses return: those of weights stay, torch reuses those of activations
_map = lru_cache(4096)(encode_tensor_map)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_not_device(tensor: torch.Tensor) -> str | None:
    """Why this GPU cannot run the kernel; None when it can."""
    capability = torch.cuda.get_device_capability(tensor.device)
    return (
        None
        if capability == CAPABILITY
        else f"sm_{capability[0]}{capability[1]} has no wgmma: sm_90 has"
    )


def why_not_shape(
    n: int, k: int, codes: torch.dtype, group: int | None, dtype: torch.dtype
) -> str | None:
    """Why this kernel cannot multiply this shape; None when it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{str(dtype).removeprefix('torch.')} input: only 16-bit floats"
    least = 32 if codes == torch.uint8 else 16
    if n % 8 or k % least:
        return f"{n}x{k} is not made of multiples of 8 and {least}"
    if codes == torch.uint8:
        fits = group % 64 == 0 and not group & (group - 1)
    else:
        fits = group in (None, 64, 128)
    return None if fits and not k % (group or 1) else f"groups of {group} in K={k}"


def _in_columns(scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(M, groups) with M fastest and columns at multiples of 16 bytes, as the fused quantizer makes
    them; the pitch.
    """
    m, groups = scale.shape
    pitch = -(-m // 4) * 4 if groups == 1 else scale.stride(1)
    if (m == 1 or scale.stride(0) == 1) and pitch >= m and pitch % 4 == 0:
        return scale, pitch
    return torch.nn.functional.pad(scale.t(), (0, -m % 4)).contiguous()[:, :m].t(), -(-m // 4) * 4


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    group: int | None,
    rows_per_scale: int,
    values: tuple[float, ...] | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(M, K) @ W.T + bias -> (M, N) `dtype`, bfloat16 or float16; groups' sums are scaled into a
    float32 total.

    4-bit codes meet x as the bits that dequantizing to `dtype` gives. INT8 sums are exact, FP8 ones
    are those of the tensor cores, which keep 14 bits of each addend.

    Args:
        x: codes of the kind of `codes`; for 4-bit codes floats of `dtype`.
        x_scale: (M, K / group) float32, M fastest; None for 4-bit codes.
        codes: (N, K) int8 or float8_e4m3fn, or (N, K/2) uint8 with the high nibble first.
        scale: float32, row-major (N / rows_per_scale, K / group).
        rows_per_scale: of W: a power of two, or N for one scale.
        group: elements along K sharing a scale, None for all.
        values: of the 16 codes of 4 bits.
    """
    m, k = x.shape
    n, device, kind = len(codes), x.device.index or 0, KINDS[codes.dtype]
    x, codes = aligned(x), aligned(codes)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    x_left, parts, step = _x_left(kind, group, rows_per_scale), _parts(kind, group), STEP[kind]
    tile = tile or tile_for(kind, group, x_left, m, n, k, _multiprocessors(device))
    entry = _entry(
        device, kind, dtype, group, x_left, rows_per_scale % tile.right == 0, tile, values
    )

    left = 64 * tile.groups
    x_rows, w_rows = (left, tile.right) if x_left else (tile.right, left)
    x_map = _map(x.data_ptr(), x.dtype, m, k, k * x.itemsize, (x_rows, step), True)
    width = codes.shape[1]
    w_map = _map(
        codes.data_ptr(),
        codes.dtype,
        n,
        width,
        width,
        (w_rows, step // 2 if kind == 4 else step),
        kind != 4,
    )
    factors, scales_map, pitch = ((x_map, w_map) if x_left else (w_map, x_map)), x_map, 0
    groups = k // group if group else 1
    if parts:
        x_scale, pitch = _in_columns(x_scale)
        if not x_left:
            scales_map = _map(
                x_scale.data_ptr(), x_scale.dtype, groups, m, 4 * pitch, (parts, tile.right), False
            )

    tiles = tile.needed(*((m, n) if x_left else (n, m)))
    clusters = tiles if tile.split > 1 else min(tiles, _multiprocessors(device))
    shift = (
        (group if kind == 4 else rows_per_scale).bit_length() - 1
        if kind == 4 or rows_per_scale < n
        else 31
    )
    has_bias = bias is not None
    pointers = (
        t.data_ptr()
        for t in (scale if x_scale is None else x_scale, scale, bias if has_bias else scale, out)
    )
    numbers = (m, n, k, has_bias, shift, groups, pitch)
    grid = (clusters * tile.split, 1, 1)
    entry.launch(
        grid, 128 * (tile.groups + 1), ARGUMENTS, *factors, scales_map, *pointers, *numbers
    )
    return out
