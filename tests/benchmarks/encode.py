"""Quantizing and decoding on a GPU against a copy and against peers; appends to results/encode.csv.

    python tests/benchmarks/encode.py

`of_copy`: for weights bf16 bytes read per second over the copy's bytes (read and written), for decoding and for
activations all bytes moved per second over the copy's. Rows of peers (tests/support/bench_peers.py) end in `by LIBRARY`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

from support import bench_layers as gpu
from support import bench_peers as peers
import torch
from linear import append

from fewbits.kernels.activations import quantize_activations
from fewbits.kernels.codebook4 import nearest_flat4
from fewbits.kernels.grids import nearest_tiles
from fewbits.kernels.levels import E4M3, INT8
from fewbits.kernels.scales import Geometry

RESULTS = Path(__file__).parent / "results" / "encode.csv"
SHAPES = ((12288, 3072), (3072, 15360), (8192, 28672))


ONE_SCALE = {
    "int8 tensor": (INT8, Geometry(None, None)),
    "fp8 tensor": (E4M3, Geometry(None, None)),
}


def quantize(name: str, weight: torch.Tensor) -> None:
    """Scale, codes and packing, as a layout quantizes; a conversion takes one code per byte first and packs later."""
    if name in gpu.FLAT:
        nearest_flat4(weight, *gpu.FLAT[name], True)
    else:
        nearest_tiles(weight, *{**gpu.TILED, **ONE_SCALE}[name])


def by_peers(
    kind: str, weights: list[torch.Tensor], layer: gpu.Layer
) -> Iterator[tuple[str, float]]:
    """(what, milliseconds) of every installed peer that a graph can capture."""
    decoding = (layer, weights[0].dtype)
    for what, found, inputs in (
        ("quantize", peers.QUANTIZE, (weights,)),
        ("decode", peers.DECODE, decoding),
    ):
        for peer in peers.installed(found, kind):
            ms, words = peers.captured_ms(peer.build(*inputs))
            if ms is None:
                print(f"{what} {kind} by {peer.label}: {words}")
            else:
                yield f"{what} {kind} by {peer.label}", ms


def measure(n: int, k: int) -> Iterator[tuple[str, int, float, int]]:
    """(what, rows, milliseconds, bytes that count)."""
    weights = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(4)]
    target = torch.empty_like(weights[0])
    yield "copy", n, gpu.graph_time([lambda w=w: target.copy_(w) for w in weights]), 4 * n * k
    for name in ONE_SCALE:
        yield (
            f"quantize {name}",
            n,
            gpu.graph_time([lambda w=w: quantize(name, w) for w in weights]),
            2 * n * k,
        )
    for name in (*gpu.TILED, *gpu.FLAT):
        layer = gpu.layer(name, n, k)
        moved = {
            "quantize": 2 * n * k,
            "decode": layer.codes[0].nbytes + layer.scales[0].nbytes + 2 * n * k,
        }
        yield (
            f"quantize {name}",
            n,
            gpu.graph_time([lambda w=w: quantize(name, w) for w in weights]),
            moved["quantize"],
        )
        yield (
            f"decode {name}",
            n,
            gpu.graph_time(layer.dequantizes(name, torch.bfloat16)),
            moved["decode"],
        )
        for what, ms in by_peers(name, weights, layer):
            yield what, n, ms, moved[what.split()[0]]
    m = min(n, 4608)
    for levels in (INT8, E4M3):
        for group in (None, 128):
            ms = gpu.graph_time(
                [lambda w=w: quantize_activations(w[:m], levels, group) for w in weights]
            )
            name = f"{levels.name} {'row' if group is None else group}"
            yield f"activations {name}", m, ms, 3 * m * k


def main() -> None:
    gpu.end_without_gpu()
    for reason in peers.missing():
        print(reason)
    for n, k in SHAPES:
        rows, speed = [], None
        for what, m, ms, moved in measure(n, k):
            speed = speed or moved / ms  # of the copy, which comes first
            rows.append(
                {"what": what, "N": m, "K": k, "ms": ms, "of_copy": round(moved / ms / speed, 3)}
            )
            print(
                f"{what:<64}{m}x{k:<8}{ms:>9.4f} ms  {rows[-1]['of_copy']:.2f} of a copy",
                flush=True,
            )
        append(RESULTS, rows)


if __name__ == "__main__":
    main()
