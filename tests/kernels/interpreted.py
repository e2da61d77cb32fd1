"""Our Triton kernels that quantize and decode weights, run by Triton's interpreter on the CPU, against eager; one line per case.

    python3 tests/kernels/interpreted.py [compile]

With `compile` nothing runs: every kernel is compiled for a GPU (sm_90) that need not be there, and `compiled KERNEL`
printed; the interpreter lets pass what the compiler refuses. Otherwise prints `equal NAME` or `DIFFERENT NAME`.

The interpreter gets what it lacks: fma that rounds once, exact casts (its own lose a carry or a subnormal), sizes from
one-element arrays (numpy >= 2.4), and the table look-up that a GPU does in assembly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# read when a kernel is defined
os.environ["TRITON_INTERPRET"] = "0" if sys.argv[1:] else "1"

import numpy
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.jit import mangle_type

from fewbits.kernels.codebook4 import E2M1, FP4, NF4, lowest_error, nearest_flat4
from fewbits.kernels.columns import sweep_levels, sweep_tables
from fewbits.kernels.dispatch import use_backend
from fewbits.kernels.grids import deviation, nearest_codes, nearest_tiles, tile_errors
from fewbits.kernels.hadamard import rotate
from fewbits.kernels.levels import E4M3, E5M2, INT4, INT8
from fewbits.kernels.packing import packed_nibbles
from fewbits.kernels.scales import Geometry, tile_absmax
from fewbits.kernels.triton import columns as _columns  # noqa: F401
from fewbits.kernels.triton import encode, errors, hadamard, launch, quantize, search, tiles, w4a8  # noqa: F401
from fewbits.kernels.w4a8 import (
    LEVELS,
    SPANS,
    W4A8Grid,
    dequantize_w4a8,
    deviation_w4a8,
    fit_groups,
    group_errors_w4a8,
    nearest_w4a8,
)

GEOMETRIES = {
    "tensor": Geometry(None, None), "row": Geometry(1, None), "group 64": Geometry(1, 64),
    "tile 16": Geometry(16, 16), "tile 64": Geometry(64, 64), "tile 256": Geometry(256, 256),
}  # fmt: skip


# The interpreter takes 13 ms for a program, of which there is one per row.
SIZES = {"row": ((5, 192), (5, 64)), "tile 256": ((256, 512),)}


def complete_the_interpreter() -> None:
    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_tensor(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_float(
        data: numpy.ndarray, source: object, target: object, rounding: object
    ) -> numpy.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(data, source, target, rounding)
        return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def fma(self: object, x: object, y: object, z: object) -> object:
        exact = x.data.astype(numpy.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    @triton.jit
    def fetch(table, strip):
        return tl.load(table + strip.to(tl.int32))

    interpreter.InterpreterBuilder.create_fma = fma
    interpreter._patch_lang_tensor, interpreter._convert_float, encode.fetch = (
        patch_tensor,
        convert_float,
        fetch,
    )


def weights(n: int, k: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Wide range of magnitudes, zero blocks of both signs, numbers below TINY, subnormal ones, the largest of a row last."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * torch.logspace(
        -8, 4, k
    )
    weight[0] = 0
    weight[1 % n, : k // 2] = -0.0
    weight[2 % n] *= 1e-30
    weight[3 % n, : k // 2] = -1e-40
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield str(dtype).removeprefix("torch."), weight.to(dtype)
    yield "transposed", weight.t().contiguous().t()


def cases() -> Iterator[tuple[str, object, tuple]]:
    """(name, op, arguments)."""
    for levels in (INT8, E4M3):
        for name, geometry in GEOMETRIES.items():
            for n, k in SIZES.get(name, ((64, 192), (64, 64))):
                for kind, weight in weights(n, k):
                    yield (
                        f"{levels.name} {name} {n}x{k} {kind}",
                        nearest_tiles,
                        (weight, levels, geometry),
                    )
        for n, k in ((1, 1), (3, 130), (2, 20000)):
            for name in ("tensor", "row"):
                weight = dict(weights(n, k))["bfloat16"]
                yield (
                    f"{levels.name} {name} {n}x{k}",
                    nearest_tiles,
                    (weight, levels, GEOMETRIES[name]),
                )
        weight = torch.randn(64, 192)
        for name, geometry in list(GEOMETRIES.items())[:5]:
            scale = torch.rand(geometry.grid_shape((64, 192))) / 99  # some codes are clamped
            yield f"codes {levels.name} {name}", nearest_codes, (weight, scale, levels, geometry, 0)
            yield f"absmax {levels.name} {name}", tile_absmax, (weight, geometry)
    for levels in (INT8, E4M3, E5M2, E2M1):  # integers and halves: sums are exact in any order
        for name, geometry in GEOMETRIES.items():
            if name == "tile 256" and levels in (E5M2, E2M1):
                continue  # 2 s each: two kinds of codes show the geometry
            shape = (256, 512) if "256" in name else (128, 192)
            weight = torch.randint(-8, 9, shape).bfloat16()
            scale = torch.ones(geometry.grid_shape(shape))
            codes = levels.round_(torch.randint(-6, 7, shape).float()).to(levels.dtype)
            for op in (deviation, tile_errors):
                yield (
                    f"{op.name} {levels.name} {name}",
                    op,
                    (weight, codes, scale, levels, geometry),
                )
    codes, scale = torch.randint(0, 16, (17, 144), dtype=torch.uint8), torch.full((17,), 2.0)
    stored = (
        torch.randint(-9, 9, (17, 144)).half(),
        codes,
        scale,
        torch.full((17, 9), 8.0).to(torch.float8_e4m3fn),
    )
    for op in (deviation_w4a8, group_errors_w4a8):
        yield op.name, op, stored
    for levels in (NF4, FP4):
        for group in (32, 64, 4096):
            for n, k in ((1, 2), (17, 130), (6, 1024)):
                for kind, weight in weights(n, k):
                    name = f"{levels.name} {group} {n}x{k} {kind}"
                    yield name, nearest_flat4, (weight, levels, group, False)
                    yield f"{name} packed", nearest_flat4, (weight, levels, group, True)
        for n, count in ((9, 64), (1, 34)):
            for kind, groups in weights(n, count):
                scale = groups.float().abs().amax(1, keepdim=True).clamp(min=1e-20)
                table = torch.randint(0, 1 << 18, (300, 13)).float()
                table[:, 7:9] = 0  # equal sums: the first wins
                yield (
                    f"errors {levels.name} {n}x{count} {kind}",
                    lowest_error,
                    (groups, scale, levels, table),
                )
        bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        for scale in (1.0, 3e-3, 1e30):
            every = bits[bits.isfinite()].view(-1, 64)
            yield f"every bfloat16 {levels.name} {scale}", nearest_codes, (
                every, torch.full((1, 1), scale), levels, Geometry(None, None), 0,
            )  # fmt: skip
        near = torch.tensor(levels.kernel)
        near = torch.stack(
            [near, near.nextafter(torch.tensor(-2.0)), near.nextafter(torch.tensor(2.0))]
        )
        near = torch.cat([near, -near]).view(1, -1)
        yield (
            f"ties {levels.name}",
            nearest_codes,
            (near, torch.ones(1, 1), levels, Geometry(1, None), 0),
        )
    for span in SPANS:
        for n, dtype in ((65, torch.float32), (3, torch.float16), (3, torch.bfloat16)):
            packed = torch.randint(-128, 128, (n, span), dtype=torch.int8)
            relative = (
                torch.arange(n * span // 8).byte().view(torch.float8_e4m3fn).view(n, -1)
            )  # NaN and -448 too
            stored = (packed, relative, torch.rand(n), torch.tensor(LEVELS))
            yield f"w4a8 {span} {n} {dtype}", dequantize_w4a8, (*stored, span, dtype)
    for group in (4, 16, 64, 256, 1024):
        for kind, weight in weights(5, 1024):
            yield f"rotate {group} {kind}", rotate, (weight, group)
    for n, k in ((1, 16), (17, 144), (9, 256)):
        for kind, weight in weights(n, k):
            weight = weight.float()
            weight[n // 2] = 1e4 * weight[n // 2].sign()  # ties between levels
            yield f"w4a8 fit {n}x{k} {kind}", fit_groups, (weight,)
            channel, relative = W4A8Grid().scale(weight)
            yield f"w4a8 codes {n}x{k} {kind}", nearest_w4a8, (weight, channel, relative)
            steps = (
                (torch.arange(relative.numel()) % 127)
                .byte()
                .view(torch.float8_e4m3fn)
                .view(relative.shape)
            )
            halves = (
                (torch.arange(n * k).view(n, k) % 255 - 127) / 2 * channel[:, None]
            )  # between two INT8 values
            yield f"w4a8 ties {n}x{k} {kind}", nearest_w4a8, (halves, channel, steps)
    for order in (True, False):
        codes = torch.randint(0, 16, (5, 34), dtype=torch.uint8)
        yield f"pack {order}", packed_nibbles, (codes, order)
    yield from sweeps()


def sweeps() -> Iterator[tuple[str, object, tuple]]:
    """Each column is moved by one other, so that no order of adding up matters.

    The interpreter takes 10 ms for a column. Eight columns fill their registers as the 128 of a real
    block do, which one case shows; twelve do not, and their 17 rows are two programs. Scales are read
    before kinds of codes part ways: one kind shows both widths.
    """
    for size, n in ((1, 1), (12, 17), (8, 16), (128, 16)):
        state = torch.randint(-40, 41, (size, n)) / 8 + torch.rand(size, n)
        mixing = torch.eye(size) * 2
        if size > 1:
            mixing[torch.arange(size - 1), torch.arange(1, size)] = torch.tensor(
                [1.0, -1.0]
            ).repeat(size)[: size - 1]
        zero = torch.rand(size, n) < 0.1
        kept = torch.randint(0, 5, (size, n), dtype=torch.uint8)
        before = torch.randint(-6, 7, (size, n)).float()
        given = {
            "feedback": (state, mixing, None, None, None),
            "feedback, zeros": (state, mixing, None, zero, kept),
            "descent": (state, mixing, before, zero, kept),
        }
        if size == 128:
            wide = torch.full((size, n), 0.5)
            yield "sweep of a real block", sweep_levels, (INT8, wide, *given["descent"])
            continue
        for name, tensors in given.items():
            for levels in (INT8, INT4, E4M3, NF4, FP4, E2M1):
                for wide in {1, n} if levels is INT8 else {n}:
                    scale = torch.full((size, wide), 0.5)
                    scale[size // 2] = 0.0
                    case = f"sweep {levels.name} {size}x{n} {wide} {name}"
                    yield case, sweep_levels, (levels, scale, *tensors)
            tables = torch.randint(-127, 128, (size, 16, n)).float().sort(1).values
            yield f"sweep tables {size}x{n} {name}", sweep_tables, (tables, torch.ones(n), *tensors)


def same(got: object, expected: object) -> bool:
    """Equal bits; any NaN for a NaN."""
    if isinstance(got, float):
        return got == expected
    if isinstance(got, tuple):
        return all(map(same, got, expected))
    if got.is_floating_point() and got.itemsize > 1:
        nan, expected_nan = got.isnan(), expected.isnan()
        if not torch.equal(nan, expected_nan):
            return False
        got, expected = got.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    return got.shape == expected.shape and torch.equal(
        got.view(torch.uint8), expected.view(torch.uint8)
    )


def compile_in_place_of_a_launch() -> None:
    compiled, original = set(), launch.launch

    def compile_once(
        kernel: triton.JITFunction,
        grid: tuple,
        tensors: tuple,
        *numbers: object,
        num_warps: int,
        num_stages: int = 3,
    ) -> None:
        constants, signature = {}, {}
        for index, (parameter, value) in enumerate(
            zip(kernel.params, (*tensors, *numbers), strict=True)
        ):
            if parameter.is_constexpr:
                constants[(index,)] = value
            signature[parameter.name] = (
                "constexpr" if parameter.is_constexpr else mangle_type(value)
            )
        # every type and every set of constants of a kernel, not each with each
        keys = {(kernel, *signature.values()), (kernel, *constants.values())}
        if keys - compiled:
            compiled.update(keys)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            print("compiled", kernel.fn.__qualname__, flush=True)

    for name, module in list(sys.modules.items()):
        if (
            name.startswith("fewbits.kernels.triton.")
            and getattr(module, "launch", None) is original
        ):
            module.launch = compile_once


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["compile"]:
        compile_in_place_of_a_launch()
        for _, op, arguments in cases():
            op.backends["triton"][0](*arguments)
        return
    complete_the_interpreter()
    for name, op, arguments in cases():
        with use_backend("eager"):
            expected = op(*arguments)
        got = op.backends["triton"][0](*arguments)
        print("equal" if same(got, expected) else "DIFFERENT", name, flush=True)


if __name__ == "__main__":
    main()
