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

from ..device import gpu_at, gpu_of
from ..kinds import Codes
from .compiler import Kernel, encode_tensor_map, kernel
from .skinny import aligned

SOURCE = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
ARGUMENTS = struct.Struct("128s128s128s4P7I4x")
SHARED_BYTES = 227 * 1024
OUT_BYTES = 5120  # of a group of warps: output on its way


class Stage(NamedTuple):
    """What a kind of codes takes of shared memory.

    k: elements of K in a stage; row: bytes of a row of W there; table: bytes of the table that
    decodes, for 4 bits the pair of each byte, once per 8 bytes of the banks.
    """

    k: int
    row: int
    table: int = 0


STAGES = {
    Codes.FOUR_BIT: Stage(64, 32, 256 * 128),
    Codes.INT8: Stage(128, 128),
    Codes.FP8: Stage(128, 128),
}


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
        Tile(64, 2, 6): Cost(0.25, 2.1),
        Tile(64, 3, 6): Cost(0.31, 3.3),
        Tile(128, 2, 5): Cost(0.34, 3.4),
        Tile(128, 3, 5): Cost(0.485, 4.4),
        Tile(256, 2, 4): Cost(0.645, 5.3),
    },
    "4-bit": {
        Tile(64, 2, 6): Cost(0.413, 2.4),
        Tile(64, 3, 6): Cost(0.54, 3.3),
        Tile(128, 2, 5): Cost(0.493, 3.2),
        Tile(128, 3, 5): Cost(0.768, 4.8),
        Tile(256, 2, 5): Cost(0.712, 4.6),
    },
    "tiles": {Tile(64, 2, 6): Cost(0.322, 1.6), Tile(128, 2, 5): Cost(0.421, 3.2)},
    "groups": {Tile(64, 2, 6): Cost(0.454, 1.9), Tile(128, 2, 5): Cost(0.689, 2.9)},
}
# Share of the multiprocessors that clusters of so many blocks can fill, as measured: each lies in
# one part of the GPU. To cut K into as many pieces as there are multiprocessors and hand sums on
# through memory was tried: that took 9 us where a cluster takes 4.
SPLITS = {1: 1.0, 2: 0.95, 3: 0.82, 4: 0.85, 6: 0.73}
SPLIT_COST = 2.0, 0.6  # us: to add sums of several blocks, and per block


class Scaling(NamedTuple):
    """How the codes of a kind are scaled.

    group: elements along K sharing a scale, None for all. rows: of W that share one.
    """

    codes: Codes
    group: int | None
    rows: int

    @property
    def stage(self) -> Stage:
        return STAGES[self.codes]

    @property
    def parts(self) -> int:
        """Groups of K with 8-bit scales of their own in a stage."""
        if self.codes == Codes.FOUR_BIT or not self.group:
            return 0
        return self.stage.k // self.group

    @property
    def x_left(self) -> bool:
        """Whether x is the left factor: where rows of W share the scales of groups along K."""
        return bool(self.parts) and self.rows % 64 == 0

    @property
    def family(self) -> str:
        """The name in `COSTS`."""
        if self.codes == Codes.FOUR_BIT:
            return "4-bit"
        if not self.group:
            return "row"
        if self.x_left:
            return "tiles"
        return "groups"

    def factors(self, m: int, n: int) -> tuple[int, int]:
        """Rows of the left and of the right factor."""
        if self.x_left:
            return (m, n)
        return (n, m)


def shared_bytes(scaling: Scaling, tile: Tile) -> int:
    """Shared memory of a block: stages, or sums to add; table of a 4-bit code; output; barriers."""
    left = 64 * tile.groups * scaling.stage.row
    scales = 0 if scaling.x_left else scaling.parts * tile.right * 4
    stages = tile.stages * (tile.right * 128 + left + scales)
    sums = tile.right * tile.groups * 256 if tile.split > 1 else 0
    beside = scaling.stage.table + tile.groups * OUT_BYTES
    return 1024 + max(stages, sums) + 16 * tile.stages + beside


def _microseconds(tile: Tile, family: str, steps: int, needed: int, multiprocessors: int) -> float:
    """Estimated time of a product that takes `needed` tiles of so many steps along K."""
    cost = COSTS[family][tile._replace(split=1)]
    if tile.split == 1:
        return -(-needed // multiprocessors) * (steps * cost.stage + cost.tile)
    adding = SPLIT_COST[0] + SPLIT_COST[1] * tile.split
    return -(-steps // tile.split) * cost.stage + cost.tile + adding


@cache
def tile_for(scaling: Scaling, m: int, n: int, k: int, multiprocessors: int) -> Tile:
    """The tile of least estimated time."""
    family, rows = scaling.family, scaling.factors(m, n)
    steps = -(-k // scaling.stage.k)
    best, least = None, float("inf")
    for whole in COSTS[family]:
        needed = whole.needed(*rows)
        for split, share in SPLITS.items():
            if split > 1 and needed * split > multiprocessors * share:
                continue
            tile = whole._replace(split=split)
            time = _microseconds(tile, family, steps, needed, multiprocessors)
            if time < least:
                best, least = tile, time
    return best


class Instruction(NamedTuple):
    """A kind of `wgmma`: its shape and types around the width, and its flags after the operands."""

    shape: str
    types: str
    flags: str
    sum: str = "f"  # the constraint of a register that holds a sum


def _instruction_of(codes: Codes, dtype: torch.dtype) -> Instruction:
    if codes == Codes.INT8:
        return Instruction("k32", "s32.s8.s8", ", p", "r")
    if codes == Codes.FP8:
        return Instruction("k32", "f32.e4m3.e4m3", ", p, 1, 1")
    float16 = "bf16" if dtype == torch.bfloat16 else "f16"
    return Instruction("k16", f"f32.{float16}.{float16}", ", p, 1, 1, 0")


def _instruction(codes: Codes, dtype: torch.dtype, width: int) -> str:
    """The function that multiplies 64 rows of the left factor by `width` of the right: an operand
    per sum of a lane.
    """
    sums = width // 2
    kind = _instruction_of(codes, dtype)
    if codes == Codes.FOUR_BIT:  # the left factor in registers
        parameter, inputs = "const u32* a", [f'"r"(a[{i}])' for i in range(4)]
        left = f"{{%{sums}, %{sums + 1}, %{sums + 2}, %{sums + 3}}}"
    else:
        parameter, inputs, left = "u64 a", ['"l"(a)'], f"%{sums}"
    outs = ", ".join(f"%{i}" for i in range(sums))
    tied = ", ".join(f'"+{kind.sum}"(d[{i}])' for i in range(sums))
    right = sums + len(inputs)
    name = f"wgmma.mma_async.sync.aligned.m64n{width}{kind.shape}.{kind.types}"
    return (
        f"DEVICE void mma(Sum (&d)[{sums}], {parameter}, u64 b, int add) {{\n"
        f'  asm volatile("{{.reg .pred p; setp.ne.u32 p, %{right + 1}, 0;\\n"\n'
        f'    "{name} {{{outs}}}, {left}, %{right}{kind.flags};}}"\n'
        f'    : {tied} : {", ".join(inputs)}, "l"(b), "r"(add));\n}}\n'
    )


def source(codes: Codes, dtype: torch.dtype, tile: Tile) -> str:
    """CUDA C++ of one variant, but for its options."""
    head, tail = SOURCE.split("//@", 1)
    return f"{head}{_instruction(codes, dtype, tile.right)}//{tail}"


def options(
    scaling: Scaling, dtype: torch.dtype, tile: Tile, values: tuple[float, ...] | None = None
) -> tuple[str, ...]:
    """Compiler options of one variant; `values` are the 16 of a 4-bit code."""
    defined = {
        "KIND": int(scaling.codes),
        "GROUPED": scaling.group or 0,
        "X_LEFT": int(scaling.x_left),
        # all rows of W in a tile share their scales
        "SAME_SCALE": int(scaling.rows % tile.right == 0),
        **{name.upper(): value for name, value in tile._asdict().items()},
    }
    flags = [f"-D{name}={value}" for name, value in defined.items()]
    if dtype == torch.bfloat16:
        flags.append("-DBF16")
    if values:
        bits = torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()
        flags.append("-DVALUES=" + ",".join(f"{b & 0xFFFFFFFF:#x}u" for b in bits))
    return tuple(flags)


@cache
def _entry(
    device: int,
    scaling: Scaling,
    dtype: torch.dtype,
    tile: Tile,
    values: tuple[float, ...] | None,
) -> Kernel:
    text = source(scaling.codes, dtype, tile)
    wanted = options(scaling, dtype, tile, values)
    return kernel(text, "multiply_wide", wanted, device, shared_bytes(scaling, tile))


# addresses return: those of weights stay, torch reuses those of activations
map_of = lru_cache(4096)(encode_tensor_map)


def why_not_device(tensor: torch.Tensor) -> str | None:
    """Why this GPU cannot run the kernel; None when it can."""
    gpu = gpu_of(tensor)
    if gpu.wgmma:
        return None
    return f"{gpu.sm} has no wgmma: sm_90 has"


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
    if fits and not k % (group or 1):
        return None
    return f"groups of {group} in K={k}"


def _in_columns(scale: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(M, groups) with M fastest and columns at multiples of 16 bytes, as the fused quantizer makes
    them; the pitch.
    """
    m, groups = scale.shape
    padded = -(-m // 4) * 4
    pitch = padded if groups == 1 else scale.stride(1)
    if (m == 1 or scale.stride(0) == 1) and pitch >= m and pitch % 4 == 0:
        return scale, pitch
    columns = torch.nn.functional.pad(scale.t(), (0, padded - m)).contiguous()
    return columns[:, :m].t(), padded


class Plan(NamedTuple):
    """A launch, ready but for the tensors. Boxes: (rows, columns) of x and of W that are fetched at
    once. `shift`: from a row of W, or an element along K of 4-bit codes, to its scale.
    """

    entry: Kernel
    grid: tuple[int, int, int]
    threads: int
    x_box: tuple[int, int]
    w_box: tuple[int, int]
    right: int
    shift: int


NO_SHIFT = 31  # every row has the first scale


def _shift(scaling: Scaling, n: int) -> int:
    if scaling.codes == Codes.FOUR_BIT:
        return scaling.group.bit_length() - 1
    if scaling.rows < n:
        return scaling.rows.bit_length() - 1
    return NO_SHIFT


@lru_cache(4096)
def plan_for(
    scaling: Scaling,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: int,
    *,
    values: tuple[float, ...] | None,
    tile: Tile | None,
) -> Plan:
    m, n, k = shape
    multiprocessors = gpu_at(device).multiprocessors
    tile = tile or tile_for(scaling, m, n, k, multiprocessors)
    left = 64 * tile.groups
    x_rows, w_rows = (left, tile.right) if scaling.x_left else (tile.right, left)
    tiles = tile.needed(*scaling.factors(m, n))
    clusters = tiles if tile.split > 1 else min(tiles, multiprocessors)
    return Plan(
        entry=_entry(device, scaling, dtype, tile, values),
        grid=(clusters * tile.split, 1, 1),
        threads=128 * (tile.groups + 1),
        x_box=(x_rows, scaling.stage.k),
        w_box=(w_rows, scaling.stage.row),
        right=tile.right,
        shift=_shift(scaling, n),
    )


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
    n, width = codes.shape
    scaling = Scaling(Codes.of(codes.dtype), group, rows_per_scale)
    plan = plan_for(scaling, (m, n, k), dtype, x.device.index or 0, values=values, tile=tile)
    x, codes = aligned(x), aligned(codes)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    swizzled = scaling.codes != Codes.FOUR_BIT
    x_map = map_of(x.data_ptr(), x.dtype, m, k, k * x.itemsize, plan.x_box, True)
    w_map = map_of(codes.data_ptr(), codes.dtype, n, width, width, plan.w_box, swizzled)
    factors = (x_map, w_map) if scaling.x_left else (w_map, x_map)
    scales_map, pitch, groups = x_map, 0, k // group if group else 1
    if scaling.parts:
        x_scale, pitch = _in_columns(x_scale)
        if not scaling.x_left:
            box = (scaling.parts, plan.right)
            address = x_scale.data_ptr()
            scales_map = map_of(address, x_scale.dtype, groups, m, 4 * pitch, box, False)
    # what is not there is not read: any address will do
    tensors = [scale if tensor is None else tensor for tensor in (x_scale, scale, bias, out)]
    pointers = [tensor.data_ptr() for tensor in tensors]
    numbers = (m, n, k, bias is not None, plan.shift, groups, pitch)
    plan.entry.launch(plan.grid, plan.threads, ARGUMENTS, *factors, scales_map, *pointers, *numbers)
    return out
