"""4-bit linears and dequantization on a GPU, against bf16 in the same run; needs CUDA.

    python tests/benchmarks/linear4.py [--sweep]

Times are medians inside a captured CUDA graph, with inputs rotated so that the cache does not hold the weights.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from pathlib import Path

import torch
import triton

from fewbits.kernels import runtime
from fewbits.kernels.codebook4 import NF4, FlatGrid
from fewbits.kernels.packing import pack_nibbles
from fewbits.kernels.triton import flat4

RESULTS = Path(__file__).parent / "results" / "linear4.csv"
SHAPES = ((12288, 3072), (3072, 12288), (3072, 15360), (3072, 3072), (1280, 1280), (5120, 13824))
ROWS = (1, 2, 16, 64, 256, 4608)
GROUP = 64


def graph_time(calls: list, repeats: int = 7, loops: int = 3) -> float:
    """Median milliseconds of one call; the list holds the same call on different inputs."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(loops):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / (loops * len(calls)))
    return statistics.median(times)


def layers(n: int, k: int) -> list[tuple]:
    """Copies of one layer, enough to exceed a 60 MB cache: (packed, absmax, bf16 weight)."""
    weight = torch.randn(n, k, device="cuda") / k**0.5
    grid = FlatGrid(NF4, GROUP)
    absmax = grid.scale(weight)
    packed = pack_nibbles(grid.encode(weight, absmax), high_first=True)
    copies = max(2, min(16, int(150e6 // packed.numel())))
    half = weight.bfloat16()
    return [(packed.clone(), absmax.clone(), half.clone()) for _ in range(copies)]


SWEEP = {  # M -> choices of (BM, BN, BH, warps, stages, largest split)
    16: ((16,), (32, 64, 128), (32,), (2, 4), (3, 5), (2, 8)),
    64: ((64,), (64, 128), (32,), (4, 8), (3, 5), (2, 8)),
}


def sweep() -> None:
    for n, k in SHAPES[:2]:
        sets = layers(n, k)
        values = runtime.code_values(NF4)
        for m, tiles in SWEEP.items():
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            found = []
            for bm, bn, bh, warps, stages, most in itertools.product(*tiles):
                if bn * bh < 4 * 32 * warps:  # the table look-up takes four bytes a thread
                    continue
                tile = (bm, bn, bh, warps, stages, most)
                try:
                    calls = [
                        lambda p=p, a=a, tile=tile: flat4.linear(x, p, a, values, GROUP, None, tile)
                        for p, a, _ in sets[:4]
                    ]
                    found.append((graph_time(calls, 3, 1), tile))
                except triton.runtime.errors.OutOfResources:
                    continue
            found.sort()
            print(f"{n}x{k} M={m}: " + "  ".join(f"{ms:.4f} {tile}" for ms, tile in found[:4]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try tile sizes instead")
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}")
    if args.sweep:
        sweep()
        return
    rows = []
    for n, k in SHAPES:
        sets = layers(n, k)
        moved = n * k * 0.5 + n * k / GROUP * 4 + n * k * 2
        copy_source = [torch.empty(n * k, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        copy_target = torch.empty(n * k, dtype=torch.bfloat16, device="cuda")
        copy = 4 * n * k / graph_time([lambda s=s: copy_target.copy_(s) for s in copy_source])
        dequantize = graph_time(
            [lambda p=p, a=a: runtime.dequantize_flat4(p, a, NF4, GROUP, torch.bfloat16) for p, a, _ in sets]
        )
        print(
            f"{n}x{k} dequantize {dequantize:.4f} ms, {moved / dequantize / 1e9:.2f} TB/s = {moved / dequantize / copy:.2f} of a copy"
        )
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            bf16 = graph_time([lambda w=w: torch.nn.functional.linear(x, w) for _, _, w in sets])
            ours = graph_time([lambda p=p, a=a: runtime.linear_flat4(x, p, a, NF4, GROUP, None) for p, a, _ in sets])
            fallback = graph_time(
                [
                    lambda p=p, a=a: torch.nn.functional.linear(x, runtime.dequantize_flat4(p, a, NF4, GROUP, x.dtype))
                    for p, a, _ in sets
                ]
            )
            rows.append({"device": device, "torch": torch.__version__, "triton": triton.__version__, "N": n, "K": k, "M": m,
                         "bf16_ms": round(bf16, 5), "nf4_ms": round(ours, 5), "speedup": round(bf16 / ours, 3),
                         "dequantize_linear_ms": round(fallback, 5),
                         "dequantize_of_copy": round(moved / dequantize / copy, 3)})  # fmt: skip
            print(
                f"{n}x{k} M={m}: bf16 {bf16:.4f}, nf4 {ours:.4f} ({bf16 / ours:.2f}x), dequantize+matmul {fallback:.4f}",
                flush=True,
            )
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
