"""Linears over stored codes on a GPU against bf16, decoding first, and peers; appends to results/linear.csv.

    python tests/benchmarks/linear.py [--only NAME] [--rows 1 16]

Medians in captured graphs (`_ms`) and of plain calls (`_plain_ms`, launches included), over copies that exceed the
cache. Peers: torch `_int_mm` and `_scaled_mm` alone (x quantized beforehand), comfy-kitchen and bitsandbytes if installed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "import_shim"), str(Path(__file__).resolve().parents[1])]

import bench_layers as gpu
import torch
import triton

from fewbits.kernels import activations, runtime
from fewbits.kernels.grids import E4M3, INT8

RESULTS = Path(__file__).parent / "results" / "linear.csv"


def peer(name: str, layer: gpu.Layer, x: torch.Tensor) -> tuple[str, list[Callable]] | None:
    """What users of this kind of codes run otherwise, if it is installed and takes the shape."""
    if name == "int8 row":
        codes, _ = activations.quantize_activations(x, INT8, None)
        return (
            ("torch _int_mm", [lambda c=c: torch._int_mm(codes, c.t()) for c in layer.codes]) if len(x) > 16 else None
        )
    if name == "fp8 row":
        codes, scale = activations.quantize_activations(x, E4M3, None)
        return "torch _scaled_mm", [
            lambda c=c, s=s: torch._scaled_mm(codes, c.t(), scale, s.t(), out_dtype=x.dtype)
            for c, s in zip(layer.codes, layer.scales)
        ]
    return None


def backend(name: str, layer: gpu.Layer, x: torch.Tensor) -> str:
    """Which body ran."""
    if name in gpu.FLAT:
        return runtime.linear_flat4.choose(x, layer.codes[0], layer.scales[0], *gpu.FLAT[name], None)[0]
    return runtime.linear_tiles.choose(x, layer.codes[0], layer.scales[0], *gpu.TILED[name], None)[0]


def measure(name: str, n: int, k: int, rows: list[int]) -> list[dict]:
    layer, results = gpu.layer(name, n, k), []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        calls, plain = layer.linears(name, x), layer.plain_linears(x)
        row = {"kind": name, "N": n, "K": k, "M": m, "backend": backend(name, layer, x),
               "ms": gpu.graph_time(calls), "bf16_ms": gpu.graph_time(plain),
               "decoded_ms": gpu.graph_time(layer.fallbacks(name, x)),
               "plain_ms": gpu.eager_time(calls), "bf16_plain_ms": gpu.eager_time(plain)}  # fmt: skip
        other = peer(name, layer, x)
        row["peer"], row["peer_ms"] = (other[0], gpu.graph_time(other[1])) if other else ("", "")
        row = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        results.append(row)
        print(f"{name:<15}{n}x{k} M={m:<5} {row['backend']:<11}{row['ms']:.4f}  bf16 {row['bf16_ms'] / row['ms']:.2f}x  "
              f"decoded {row['decoded_ms'] / row['ms']:.2f}x  plain {row['bf16_plain_ms'] / row['plain_ms']:.2f}x  "
              f"{row['peer']} {row['peer_ms']}", flush=True)  # fmt: skip
    return results


def append(path: Path, rows: list[dict]) -> None:
    """Rows to a CSV with the device and the versions in front."""
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*where, *rows[0]], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**where, **row} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a kind of codes; repeatable")
    parser.add_argument("--rows", type=int, nargs="+", default=list(gpu.ROWS))
    args = parser.parse_args()
    gpu.end_without_gpu()
    for name in args.only or [*gpu.TILED, *gpu.FLAT]:
        append(RESULTS, [row for n, k in gpu.SHAPES for row in measure(name, n, k, args.rows)])


if __name__ == "__main__":
    main()
