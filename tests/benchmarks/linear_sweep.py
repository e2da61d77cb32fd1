"""Try tile sizes of the linear kernels on this GPU and print the fastest per shape; the tables in kernels/ come from it.

python tests/benchmarks/linear_sweep.py [skinny] [wide] [quantizer] [library] [coded]
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

from support import bench_layers as gpu
import torch
import triton

from fewbits.kernels.cuda import skinny, wide
from fewbits.kernels.kinds import Codes
from fewbits.kernels.levels import E4M3, INT8, code_values
from fewbits.kernels.triton import activations, w8a8
from fewbits.kernels.triton.w8a8 import Tile

SHAPES = ((12288, 3072), (3072, 12288), (3072, 15360), (3072, 3072), (1280, 1280))
SKINNY = ("nf4 64", "int8 row", "int8 block 128", "fp8 row", "fp8 block 64")
WARPS = ((1, 4), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4), (8, 1))  # (side by side, along K)
CLUSTERS, STAGES = (1, 2, 4), (2, 3)


def sweep_skinny(
    kinds: tuple[str, ...] = SKINNY, rows: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
) -> None:
    jobs, shared = [], torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    for name in kinds:
        levels, geometry = gpu.FLAT.get(name) or gpu.TILED[name]
        flat = name in gpu.FLAT
        codes, values = torch.uint8 if flat else levels.dtype, code_values(levels) if flat else None
        group, per_scale = (geometry, 1) if flat else (geometry.cols, geometry.rows)
        for m, warps, cluster, stages in itertools.product(rows, WARPS, CLUSTERS, STAGES):
            work = skinny.Work(m, *warps, cluster, stages)
            if skinny.shared_bytes(codes, work) <= shared:
                jobs.append(
                    (
                        name,
                        m,
                        work,
                        (codes, torch.bfloat16, group, group is not None, work, values),
                        group,
                        per_scale,
                        values,
                    )
                )
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda j: skinny._entry(0, *j[3]), jobs))
    for name, (n, k) in itertools.product(kinds, SHAPES):
        layer = gpu.layer(name, n, k)
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            bf16 = gpu.graph_time(layer.plain_linears(x), 5)
            found = []
            for _, _, work, _, group, per_scale, values in (
                job for job in jobs if job[:2] == (name, m)
            ):
                calls = [
                    lambda c=c, s=s: skinny.multiply(x, c, s, None, group, per_scale, values, work)
                    for c, s in zip(layer.codes, layer.scales)
                ]
                found.append((gpu.graph_time(calls, 3), work))
            report(f"{name} {n}x{k} M={m}", bf16, found)


WIDE = ("nf4 64", "int8 row", "fp8 row", "int8 block 128", "fp8 block 128", "int8 group 128")


def sweep_wide(
    kinds: tuple[str, ...] = WIDE, rows: tuple[int, ...] = (64, 128, 256, 512, 1024, 4608)
) -> None:
    """Hopper's kernel with every tile of its table, alone and with K split: what `wide.COSTS` was fitted to."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for name, (n, k), m in itertools.product(kinds, (*SHAPES, (5120, 13824)), rows):
        layer, x, quantizer = (
            gpu.layer(name, n, k),
            torch.randn(m, k, device="cuda", dtype=torch.bfloat16),
            0.0,
        )
        if name in gpu.FLAT:
            (levels, group), per_scale, inputs = gpu.FLAT[name], 1, (x, None)
            values = code_values(levels)
        else:
            levels, geometry = gpu.TILED[name]
            group, per_scale, values = geometry.cols, geometry.rows or n, None
            quantize = partial(activations.quantize, x, levels, group)
            inputs, quantizer = quantize(), gpu.graph_time([quantize] * 4, 3)
        scaling, found = wide.Scaling(Codes.of(levels.dtype), group, per_scale), []
        for tile, split in itertools.product(wide.COSTS[scaling.family], wide.SPLITS):
            tile = tile._replace(split=split)
            if split > 1 and tile.needed(*scaling.factors(m, n)) * split > multiprocessors:
                continue
            calls = [
                lambda c=c, s=s: wide.multiply(
                    *inputs, c, s, None, x.dtype, group, per_scale, values, tile
                )
                for c, s in zip(layer.codes, layer.scales)
            ]
            found.append((quantizer + gpu.graph_time(calls, 3), tile))
        chosen = wide.tile_for(scaling, m, n, k, multiprocessors)
        lost = {tile: ms for ms, tile in found}[chosen] / min(found)[0] - 1
        report(
            f"{name} {n}x{k} M={m} (chosen {lost:.0%} slower)",
            gpu.graph_time(layer.plain_linears(x), 3),
            found,
        )


BIG = [Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 3), Tile(128, 128, 128, 4, 3), Tile(128, 128, 128, 4, 2),
       Tile(128, 128, 64, 4, 4), Tile(128, 128, 128, 8, 3, 1, 4), Tile(128, 128, 128, 8, 3, 1, 16), Tile(256, 128, 64, 8, 4)]  # fmt: skip
GROUPED = [Tile(128, 64, 128, 4, 3), Tile(128, 64, 128, 4, 4), Tile(64, 128, 128, 4, 3), Tile(64, 128, 128, 4, 4),
           Tile(128, 128, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(128, 128, 128, 8, 2), Tile(64, 64, 128, 4, 4),
           Tile(128, 256, 128, 8, 3), Tile(64, 256, 128, 8, 3), Tile(64, 128, 128, 8, 3), Tile(128, 64, 128, 8, 3)]  # fmt: skip
MIDDLE = [Tile(m, n, k, w, s, split) for m, n, k, w, s in (
          (64, 64, 128, 4, 4), (64, 64, 128, 4, 6), (64, 64, 256, 4, 3), (128, 64, 128, 4, 4), (128, 64, 256, 4, 3),
          (64, 128, 128, 4, 4), (128, 128, 128, 8, 4), (128, 128, 256, 8, 2), (256, 64, 128, 8, 4), (256, 128, 128, 8, 3),
          (128, 96, 128, 4, 4)) for split in (1, 2, 4)]  # fmt: skip
MIDDLE = [tile for tile in MIDDLE if tile.n != 96]
SMALL = [Tile(m, n, k, w, s, split) for m, n, k, w, s in (
         (64, 32, 128, 4, 5), (64, 32, 256, 4, 4), (64, 64, 128, 4, 5), (64, 64, 256, 4, 4), (64, 128, 128, 4, 4))
         for split in (1, 2, 4, 8)]  # fmt: skip
TINY = [Tile(16, n, k, w, s, split) for n, k, w, s in (
        (32, 128, 2, 5), (64, 128, 4, 5), (64, 256, 4, 4), (128, 128, 4, 4), (128, 256, 4, 3))
        for split in (1, 2, 4, 8)]  # fmt: skip
CODED = ("int8 row", "int8 block 128", "int8 block 64", "fp8 row", "fp8 block 128", "fp8 block 64")


def candidates(m: int, geometry) -> list[Tile]:
    if m > 256:
        tiles = GROUPED if geometry.cols else BIG
    else:
        tiles = next(tiles for most, tiles in ((16, TINY), (64, SMALL), (256, MIDDLE)) if m <= most)
    return [t._replace(k=min(t.k, geometry.cols or t.k)) for t in tiles]


def sweep_coded(part: int | None = None) -> None:
    jobs = list(itertools.product(CODED, SHAPES[:2], (16, 64, 256, 1024, 4608)))
    for index, (name, (n, k), m) in enumerate(jobs):
        if part is not None and index % 12 != part:
            continue
        levels, geometry = gpu.TILED[name]
        layer = gpu.layer(name, n, k)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        xc, xs = activations.quantize(x, levels, geometry.cols)
        found = []
        for tile in candidates(m, geometry):
            calls = [
                lambda c=c, s=s: w8a8.multiply(
                    xc, xs, c, s, None, x.dtype, geometry.cols, geometry.rows, tile
                )
                for c, s in zip(layer.codes, layer.scales)
            ]
            try:
                if part is not None:
                    calls[0]()
                    continue
                found.append((gpu.graph_time(calls, 3), tuple(tile)))
            except (
                triton.runtime.errors.OutOfResources,
                triton.compiler.CompilationError,
                RuntimeError,
            ) as error:
                print("  ", tile, type(error).__name__, str(error)[:80], flush=True)
        if part is None:
            quantizer = gpu.graph_time([lambda: activations.quantize(x, levels, geometry.cols)] * 4)
            report(
                f"{name} {n}x{k} M={m} (quantizer {quantizer:.4f})",
                gpu.graph_time(layer.plain_linears(x)),
                found,
            )


def sweep_library() -> None:
    """torch's own FP8 and INT8 products on ready-made codes, to compare with `coded`."""
    for (n, k), m in itertools.product(SHAPES, (16, 64, 256, 1024, 4608)):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        row, block, int8 = (
            gpu.layer("fp8 row", n, k),
            gpu.layer("fp8 block 128", n, k),
            gpu.layer("int8 row", n, k),
        )
        xc, xs = activations.quantize(x, E4M3, None)
        gc, gs = activations.quantize(x, E4M3, 128)
        ic, _ = activations.quantize(x, INT8, None)
        scaled = torch._scaled_mm
        calls = {
            f"scaled_mm row fast={fast}": [
                lambda c=c, s=s: scaled(
                    xc, c.t(), xs, s.t(), out_dtype=x.dtype, use_fast_accum=fast
                )
                for c, s in zip(row.codes, row.scales)
            ]
            for fast in (False, True)
        }
        calls["scaled_mm block"] = [
            lambda c=c, s=s: scaled(gc, c.t(), gs, s.t(), out_dtype=x.dtype)
            for c, s in zip(block.codes, block.scales)
        ]
        calls["_int_mm"] = [lambda c=c: torch._int_mm(ic, c.t()) for c in int8.codes]
        found = []
        for name, timed in calls.items():
            try:
                found.append((gpu.graph_time(timed, 3), (name,)))
            except RuntimeError as error:
                print("  ", name, str(error)[:150], flush=True)
        report(f"library {n}x{k} M={m}", gpu.graph_time(row.plain_linears(x)), found)


def sweep_quantizer() -> None:
    for m, k in ((256, 3072), (256, 12288), (4608, 3072), (4608, 12288), (4608, 15360)):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        copies = [x.clone() for _ in range(max(2, int(2.5 * gpu.CACHE // x.nbytes)))]
        target = torch.empty_like(x)
        copy = (
            gpu.graph_time([lambda c=c: target.copy_(c) for c in copies]) * 0.75
        )  # 3 bytes moved instead of 4
        for levels in (INT8, E4M3):
            found = []
            for shape in itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16)):
                calls = [lambda c=c: activations.quantize(c, levels, None, shape) for c in copies]
                found.append((gpu.graph_time(calls, 3), shape))
            grouped = gpu.graph_time(
                [lambda c=c: activations.quantize(c, levels, 128) for c in copies]
            )
            report(
                f"quantizer {levels.name} {m}x{k}, copying as many bytes {copy:.4f}, groups {grouped:.4f}",
                copy,
                found,
            )


def report(title: str, bf16: float, found: list) -> None:
    found.sort()
    best = "  ".join(f"{ms:.4f} {','.join(map(str, what))}" for ms, what in found[:5])
    print(f"{title}: bf16 {bf16:.4f}; {best}", flush=True)


def main() -> None:
    gpu.end_without_gpu()
    wanted = sys.argv[1:] or ["skinny", "wide", "quantizer", "library", "coded"]
    if wanted[0] == "compile":
        sweep_coded(int(wanted[1]))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    if "skinny" in wanted:
        sweep_skinny()
    if "wide" in wanted:
        sweep_wide()
    if "quantizer" in wanted:
        sweep_quantizer()
    if "library" in wanted:
        sweep_library()
    if (
        "coded" in wanted
    ):  # Triton compiles one kernel at a time; processes fill its cache side by side
        parts = [subprocess.Popen([sys.executable, __file__, "compile", str(i)]) for i in range(12)]
        for process in parts:
            process.wait()
        sweep_coded()


if __name__ == "__main__":
    main()
