"""Our Triton kernels that make INT8 rows, run by Triton's interpreter on the CPU, against eager and float64.

    python3 tests/kernels/interpreted_rows.py [compile | gpu]

With `compile` nothing runs: every kernel is compiled for GPUs that need not be there. With `gpu` the kernels run on one
instead. Otherwise prints `ok NAME` or `WRONG NAME`, after what is wrong. Rotated rows are sums in another order than
eager's, so that a code may be the next one: they err at most a twentieth more than eager's against float64, and their
largest error is at most twice eager's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import interpreted  # sets TRITON_INTERPRET, unless it is to compile
import torch
import triton.language as tl

from fewbits.kernels import rows
from fewbits.kernels.codebook4 import FP4, NF4, FlatGrid
from fewbits.kernels.dispatch import use_backend
from fewbits.kernels.grids import TiledGrid, decode
from fewbits.kernels.hadamard import rotate
from fewbits.kernels.levels import E4M3, INT8
from fewbits.kernels.mxfp8 import Mxfp8Grid
from fewbits.kernels.nvfp4 import Nvfp4Grid
from fewbits.kernels.packing import pack_nibbles, swizzle_scales
from fewbits.kernels.scales import Geometry
from fewbits.kernels.triton import rows as kernels
from fewbits.kernels.w4a8 import LEVELS, W4A8Grid

DEVICE = "cuda" if sys.argv[1:] == ["gpu"] else "cpu"


def complete_the_interpreter() -> None:
    import triton

    interpreted.complete_the_interpreter()

    @triton.jit
    def looked_up(byte, table, ASM: tl.constexpr, SPEC: tl.constexpr):
        at = byte.to(tl.int32)
        return tl.load(table + (at >> 4)), tl.load(table + (at & 15))

    kernels.values_of = looked_up


def activations() -> Iterator[tuple[str, torch.Tensor, int]]:
    """Channels of very different sizes, a row of zeros, rows that are very large and very small."""
    for span, k in (
        (256, 256),
        (256, 1280),
        (256, 3072),
        (64, 192),
        (64, 1088),
        (16, 48),
        (16, 16),
    ):
        for dtype in (torch.bfloat16, torch.float16):
            x = torch.randn(5, k) * torch.logspace(-2, 1, k)
            x[1] = 0
            x[2] *= 1e-3
            x[3] *= 50
            yield f"x {span} {k} {dtype}", x.to(dtype), span
    x = torch.randn(3, 512 + 24).bfloat16()[:, 3:515]
    yield "x within longer rows", x, 256


def weights() -> Iterator[tuple[str, object, tuple, torch.Tensor]]:
    """(name, op, its arguments less the span, the decoded weight)."""
    for n, k in ((3, 256), (5, 1280), (2, 192)):
        weight = torch.randn(n, k) / k**0.5 * torch.logspace(-1, 1, k)
        weight[0] = 0
        for levels, group in ((NF4, 64), (FP4, 32), (NF4, 16), (NF4, k if k == 256 else 64)):
            grid = FlatGrid(levels, group)
            absmax = grid.scale(weight)
            codes = grid.encode(weight, absmax)
            packed = pack_nibbles(codes, high_first=True)
            name = f"{levels.name} {group} {n}x{k}"
            yield name, rows.rows_flat4, (packed, absmax, levels, group), grid.decode(codes, absmax)
    for levels in (INT8, E4M3):
        for geometry in (Geometry(64, 64), Geometry(16, 16), Geometry(1, 64), Geometry(1, 128)):
            weight = torch.randn(max(geometry.rows, 3), 256) * torch.logspace(-1, 1, 256)
            weight[: geometry.rows] = 0
            grid = TiledGrid(levels, geometry)
            scale = grid.scale(weight)
            codes = grid.encode(weight, scale)
            truth = decode(codes, scale, levels, geometry)
            name = f"{levels.name} {geometry.rows}x{geometry.cols}"
            yield name, rows.rows_tiles, (codes, scale, levels, geometry), truth
    for n, k in ((3, 256), (130, 192), (33, 1280)):
        weight = torch.randn(n, k) / k**0.5
        weight[0] = 0
        scale = Nvfp4Grid().scale(weight)
        codes = Nvfp4Grid().encode(weight, scale)
        block = swizzle_scales(scale.block.view(torch.uint8)).view(torch.float8_e4m3fn)
        stored = (pack_nibbles(codes, high_first=True), block, scale.per_tensor)
        yield f"nvfp4 {n}x{k}", rows.rows_nvfp4, stored, Nvfp4Grid().decode(codes, scale)
        exponent = Mxfp8Grid().scale(weight)
        codes = Mxfp8Grid().encode(weight, exponent)
        stored = (codes, swizzle_scales(exponent).view(torch.float8_e8m0fnu))
        yield f"mxfp8 {n}x{k}", rows.rows_mxfp8, stored, Mxfp8Grid().decode(codes, exponent)


def decoded(made: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    codes, scale = made
    return codes.double().cpu() * scale.double().cpu()


def on_device(arguments: tuple) -> tuple:
    return tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments)


BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("triton",)


def faults(op: object, arguments: tuple, plain: torch.Tensor, span: int) -> list[str]:
    """What is wrong with the kernels' rows of a matrix, in words."""
    with use_backend("eager"):
        truth = rotate(plain.double().float(), span).double()
        reference = decoded(op(*arguments, span))
    found = []
    for backend in BACKENDS:
        body, why_not = op.backends[backend]
        if backend == "cuda" and why_not(*on_device(arguments), span):
            continue
        made = body(*on_device(arguments), span)
        wrong = compared(made, plain, truth, reference)
        if DEVICE == "cuda":  # the interpreter runs one program after the other
            again = body(*on_device(arguments), span)
            if not all(torch.equal(*pair) for pair in zip(made, again)):
                wrong.append("twice is not the same")
        found += [f"{backend}: {text}" for text in wrong]
    return found


def compared(
    made: tuple, plain: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor
) -> list[str]:
    codes, scale = made
    got, found = decoded(made), []
    ours, theirs = got - truth, reference - truth
    if not ours.abs().max() <= 2 * theirs.abs().max():
        found.append(f"largest error {ours.abs().max():.3g}, eager's {theirs.abs().max():.3g}")
    if not ours.norm() <= 1.05 * theirs.norm():
        found.append(f"error {ours.norm():.4g}, eager's {theirs.norm():.4g}")
    zero = plain.abs().amax(1) == 0
    if codes[zero.to(codes.device)].any() or not (scale[zero.to(codes.device)] == 1).all():
        found.append("a row of zeros is not zero")
    if codes.shape != plain.shape or codes.dtype != torch.int8 or int(codes.min()) < -127:
        found.append("shape or range of codes")
    return found


def spans_for(n: int, k: int) -> list[int]:
    """Every span that divides K; of many rows, each of which the interpreter runs alone, the largest."""
    fitting = [span for span in rows.SPANS if k % span == 0]
    return fitting if n < 64 or DEVICE == "cuda" else [max(fitting)]


def cases() -> Iterator[tuple[str, list[str]]]:
    for name, x, span in activations():
        yield name, faults(rows.quantize_rotated, (x,), x.float(), span)
    for name, op, stored, plain in weights():
        for span in spans_for(*plain.shape):
            yield f"{name} {span}", faults(op, stored, plain, span)
        if op.name in EXACT:
            for dtype in (torch.bfloat16, torch.float32):
                exact = EXACT[op.name]
                got = exact.backends["triton"][0](*on_device(stored), dtype).cpu()
                same = torch.equal(got, exact.eager(*stored, dtype))
                yield f"{name} {dtype}", [] if same else ["decoded bits differ"]
    yield from special()


EXACT = {"rows_nvfp4": rows.dequantize_nvfp4, "rows_mxfp8": rows.dequantize_mxfp8}


def special() -> Iterator[tuple[str, list[str]]]:
    """NaN and infinity stay in their rows; W4A8's values are exact."""
    for backend in BACKENDS:
        quantize, flat4, exact = (
            op.backends[backend][0]
            for op in (rows.quantize_rotated, rows.rows_flat4, rows.rows_w4a8)
        )
        for value in (float("nan"), float("inf"), 3e38):
            for span in rows.SPANS if backend == "triton" else (256,):
                x = torch.randn(4, 512).bfloat16()
                x[1, 300] = value
                codes, scale = quantize(*on_device((x,)), span)
                right = scale.isfinite().flatten().tolist() == [True, value == 3e38, True, True]
                right &= value != 3e38 or bool(codes[1].any())
                found = [] if right else [f"scales {scale.flatten().tolist()}"]
                yield f"{backend} {value} in x {span}", found
        packed, absmax = torch.randint(0, 256, (3, 128), dtype=torch.uint8), torch.ones(12)
        absmax[5] = float("nan")
        _, scale = flat4(*on_device((packed, absmax)), NF4, 64, 256)
        right = scale.isnan().flatten().tolist() == [False, True, False]
        yield f"{backend} NaN in a scale", [] if right else [f"scales {scale.flatten().tolist()}"]
        for n, k in ((3, 256), (17, 144), (5, 1280)):
            if backend == "cuda" and k % 256:
                continue
            yield f"{backend} w4a8 {n}x{k}", exact_values(exact, n, k)


def exact_values(kernel: object, n: int, k: int) -> list[str]:
    """Faults of W4A8's INT8 values, of which one scale is NaN."""
    weight = rotate(torch.randn(n, k), 16)
    grid = W4A8Grid()
    scale = grid.scale(weight)
    packed = pack_nibbles(grid.encode(weight, scale), high_first=False).view(torch.int8)
    relative = scale.relative.clone()
    relative[1, 2] = float("nan")
    stored = (packed, relative, scale.channel, torch.tensor(LEVELS))
    codes, channel = (made.cpu() for made in kernel(*on_device(stored)))
    expected, expected_channel = rows.rows_w4a8.eager(*stored)
    finite = torch.arange(n) != 1
    right = torch.equal(codes[finite], expected[finite])
    right &= torch.equal(channel.nan_to_num(7), expected_channel.nan_to_num(7))
    return [] if right else ["values or scales differ"]


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    if sys.argv[1:] == ["compile"]:
        interpreted.compile_in_place_of_a_launch()
    elif DEVICE == "cpu":
        complete_the_interpreter()
    for name, found in cases():
        if sys.argv[1:] != ["compile"]:
            print("WRONG" if found else "ok", name, *found, flush=True)


if __name__ == "__main__":
    main()
