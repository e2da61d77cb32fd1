"""Every kernel on one odd shape of each kind, for NVIDIA's checkers; prints one line per backend that ran or why it did not.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=tests/import_shim:tests
    compute-sanitizer --tool memcheck --error-exitcode 9 python3 tests/kernels/sanitize.py [linear_flat4 int8 ...]

Words choose the cases whose name holds one of them. Also for `--tool racecheck` and `synccheck`. The variable makes
every tensor an allocation of its own, so that an access next to it is seen. Tables of measured speed are set aside: what
can run, runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import torch

from fewbits.kernels import runtime
from fewbits.kernels.activations import quantize_activations
from fewbits.kernels.codebook4 import FP4, NF4, FlatGrid, lowest_error, nearest_flat4
from fewbits.kernels.dispatch import Op, use_backend
from fewbits.kernels.grids import TiledGrid, nearest_codes, nearest_tiles, tile_errors
from fewbits.kernels.hadamard import rotate
from fewbits.kernels.levels import E4M3, INT8, Levels
from fewbits.kernels.packing import pack_nibbles, packed_nibbles
from fewbits.kernels.scales import Geometry, tile_absmax
from fewbits.kernels.w4a8 import (
    LEVELS,
    SPANS,
    W4A8Grid,
    dequantize_w4a8,
    fit_groups,
    group_errors_w4a8,
    nearest_w4a8,
)

GEOMETRIES = {
    "tensor": Geometry(None, None), "row": Geometry(1, None), "tile 128": Geometry(128, 128),
    "tile 64": Geometry(64, 64), "group 128": Geometry(1, 128), "group 64": Geometry(1, 64),
}  # fmt: skip
ROWS = {
    torch.bfloat16: (1, 17, 132),
    torch.float16: (17,),
    torch.float32: (17,),
}  # each compiles kernels of its own
FEW = {torch.bfloat16: (17,)}
APART = 0.08  # rel_l2 of two bodies of one op; rounding activations to FP8 alone is 0.03


def cases() -> Iterator[tuple[str, Op, tuple]]:
    """(name, op, arguments)."""
    torch.manual_seed(0)
    for levels in (INT8, E4M3):
        for name, geometry in GEOMETRIES.items():
            yield from tiled(f"{levels.name} {name}", levels, geometry)
        for group in (None, 64, 128):
            for k in (1152, 13056):  # each way of walking a row
                x = torch.randn(17, k, device="cuda").bfloat16()
                yield (
                    f"{levels.name} {group or 'row'} K={k}",
                    quantize_activations,
                    (x, levels, group),
                )
    for levels in (NF4, FP4):
        yield from flat(levels)
    for group in (16, 256, 1024):
        yield str(group), rotate, (torch.randn(5, 3 * group, device="cuda").bfloat16(), group)
    weight = torch.randn(65, 144, device="cuda")
    yield "65x144", fit_groups, (weight,)
    scale = W4A8Grid().scale(weight)
    codes = nearest_w4a8(weight, *scale)
    yield "65x144", nearest_w4a8, (weight, *scale)
    yield "65x144", group_errors_w4a8, (weight, codes, *scale)
    for span in SPANS:
        packed = torch.randint(-128, 128, (65, 3 * span // 2), dtype=torch.int8, device="cuda")
        relative = torch.rand(65, 3 * span // 16, device="cuda").mul(127).to(torch.float8_e4m3fn)
        stored = (
            packed,
            relative,
            torch.rand(65, device="cuda"),
            torch.tensor(LEVELS, device="cuda"),
        )
        yield str(span), dequantize_w4a8, (*stored, span, torch.bfloat16)


def tiled(name: str, levels: Levels, geometry: Geometry) -> Iterator[tuple[str, Op, tuple]]:
    n, k = (256 if geometry.rows and geometry.rows > 1 else 272), 1536
    weight = torch.randn(n, k, device="cuda") / k**0.5
    scale = TiledGrid(levels, geometry).scale(weight)
    yield name, tile_absmax, (weight.bfloat16(), geometry)
    yield name, nearest_codes, (weight, scale, levels, geometry, 0)
    for wide in (weight, torch.randn(n, 20480, device="cuda")):  # each way of walking a row
        yield f"{name} K={wide.shape[1]}", nearest_tiles, (wide, levels, geometry)
    codes = TiledGrid(levels, geometry).encode(weight, scale)
    yield name, tile_errors, (weight, codes, scale, levels, geometry)
    for dtype, rows in (FEW if name.endswith(("tensor", "group 64")) else ROWS).items():
        yield f"{name} {dtype}", runtime.dequantize_tiles, (codes, scale, levels, geometry, dtype)
        for m in rows:
            x, bias = (
                torch.randn(m, k, device="cuda").to(dtype),
                torch.randn(n, device="cuda").to(dtype),
            )
            yield (
                f"{name} M={m} {dtype}",
                runtime.linear_tiles,
                (x, codes, scale, levels, geometry, bias),
            )


def flat(levels: Levels) -> Iterator[tuple[str, Op, tuple]]:
    for n, k, group in ((257, 1088, 64), (264, 1088, 64), (130, 1536, 128), (65, 96, 32)):
        weight = torch.randn(n, k, device="cuda") / k**0.5
        grid, name = FlatGrid(levels, group), f"{levels.name} {group}"
        absmax = grid.scale(weight)
        runs = weight.view(-1, group)
        yield name, nearest_codes, (runs, absmax.view(-1, 1), levels, Geometry(1, None), 0)
        for pack in (False, True):
            yield f"{name} packed={pack}", nearest_flat4, (weight, levels, group, pack)
        table = torch.randint(0, 1 << 17, (2048, 88), device="cuda").float()
        yield name, lowest_error, (runs, absmax.view(-1, 1), levels, table)
        codes = grid.encode(weight, absmax)
        yield (
            name,
            tile_errors,
            (runs, codes.view(-1, group), absmax.view(-1, 1), levels, Geometry(1, None)),
        )
        yield name, packed_nibbles, (codes, True)
        packed = pack_nibbles(codes, high_first=True)
        for dtype, rows in ROWS.items():
            yield (
                f"{name} {dtype}",
                runtime.dequantize_flat4,
                (packed, absmax, levels, group, dtype),
            )
            for m in rows:
                x, bias = (
                    torch.randn(m, k, device="cuda").to(dtype),
                    torch.randn(n, device="cuda").to(dtype),
                )
                yield (
                    f"{name} M={m} {dtype}",
                    runtime.linear_flat4,
                    (x, packed, absmax, levels, group, bias),
                )


def difference(got: object, expected: object) -> float:
    """rel_l2 of two results; of several tensors the largest."""
    if isinstance(got, tuple):
        return max(difference(a, b) for a, b in zip(got, expected, strict=True))
    a, b = got.double().cpu(), expected.double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def main() -> None:
    if not torch.cuda.is_available():
        print("sanitize: needs an NVIDIA GPU; nothing was checked")
        return
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        sys.exit(
            "sanitize: set PYTORCH_NO_CUDA_MEMORY_CACHING=1; torch's own pool hides accesses next to a tensor"
        )
    ran, wrong, words = 0, [], sys.argv[1:]
    for name, op, arguments in cases():
        if words and not any(word in f"{op.name} {name}" for word in words):
            continue
        with use_backend("eager"):
            expected = op(*arguments)
        for backend, (body, why_not) in op.backends.items():
            if reason := why_not(*arguments):
                print(f"-  {op.name} {backend} {name}: {reason}")
                continue
            apart = difference(body(*arguments), expected)
            torch.cuda.synchronize()
            ran += 1
            print(f"ok {op.name} {backend} {name}: {apart:.1e} from eager", flush=True)
            if not apart < APART:
                wrong.append(f"{op.name} {backend} {name}: {apart}")
    print(f"{ran} runs; wrong: {wrong or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
