"""Quantizing and decoding on a GPU against a copy; appends to results/encode.csv.

    python tests/benchmarks/encode.py

`of_copy`: for weights bf16 bytes read per second over the copy's bytes (read and written), for decoding and for
activations all bytes moved per second over the copy's.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "import_shim"), str(Path(__file__).resolve().parents[1])]

import bench_layers as gpu
import torch
from linear import append

from fewbits.kernels.activations import quantize_activations
from fewbits.kernels.codebook4 import FlatGrid
from fewbits.kernels.grids import E4M3, INT8, TiledGrid, nearest_codes
from fewbits.kernels.packing import pack_nibbles
from fewbits.kernels.scales import Geometry

RESULTS = Path(__file__).parent / "results" / "encode.csv"
SHAPES = ((12288, 3072), (3072, 15360), (8192, 28672))


def quantize(name: str, weight: torch.Tensor) -> None:
    """Scale, codes and packing as a conversion does them; zero blocks are cleared by reading a flag, which a graph
    cannot, so the codes are taken without that step."""
    if name in gpu.FLAT:
        levels, group = gpu.FLAT[name]
        grid = FlatGrid(levels, group)
        runs, scale = weight.view(-1, group), grid.scale(weight)
        codes = nearest_codes(runs, scale.view(-1, 1), levels, Geometry(1, None), 0)
        pack_nibbles(codes.view(weight.shape), high_first=True)
        return
    levels, geometry = gpu.TILED[name]
    nearest_codes(weight, TiledGrid(levels, geometry).scale(weight), levels, geometry, 0)


def main() -> None:
    gpu.end_without_gpu()
    rows = []
    for n, k in SHAPES:
        weights = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(4)]
        target = torch.empty_like(weights[0])
        copied = gpu.graph_time([lambda w=w: target.copy_(w) for w in weights])
        speed = 4 * n * k / copied
        rows.append({"what": "copy", "N": n, "K": k, "ms": copied, "of_copy": 1.0})
        for name in (*gpu.TILED, *gpu.FLAT):
            ms = gpu.graph_time([lambda w=w: quantize(name, w) for w in weights])
            rows.append({"what": f"quantize {name}", "N": n, "K": k, "ms": ms, "of_copy": 2 * n * k / ms / speed})
            layer = gpu.layer(name, n, k)
            moved = layer.codes[0].nbytes + layer.scales[0].nbytes + 2 * n * k
            ms = gpu.graph_time(layer.dequantizes(name, torch.bfloat16))
            rows.append({"what": f"decode {name}", "N": n, "K": k, "ms": ms, "of_copy": moved / ms / speed})
        for levels in (INT8, E4M3):
            for group in (None, 128):
                ms = gpu.graph_time([lambda w=w: quantize_activations(w[:4608], levels, group) for w in weights])
                what = f"activations {levels.name} {'row' if group is None else group}"
                moved = 3 * min(n, 4608) * k
                rows.append({"what": what, "N": min(n, 4608), "K": k, "ms": ms, "of_copy": moved / ms / speed})
    for row in rows:
        row["ms"], row["of_copy"] = round(row["ms"], 5), round(row["of_copy"], 3)
        print(f"{row['what']:<28}{row['N']}x{row['K']:<8}{row['ms']:>9.4f} ms  {row['of_copy']:.2f} of a copy")
    append(RESULTS, rows)


if __name__ == "__main__":
    main()
