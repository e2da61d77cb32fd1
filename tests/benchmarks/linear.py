"""Linears over stored codes on a GPU against bf16, decoding first, and peers; appends to results/linear.csv, peers.csv.

    python tests/benchmarks/linear.py [--only "nf4 64"] [--rows 1 16] [--shapes 12288x3072]

Medians in captured graphs (`_ms`) and of plain calls (`_plain_ms`, launches included), over copies that exceed the
cache. Peers (tests/support/bench_peers.py) are timed right after ours on the same layer; those not installed are named first.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

from support import bench_layers as gpu
from support import bench_peers as peers
import torch
import triton

from fewbits.kernels import runtime

RESULTS = Path(__file__).parent / "results"


def backend(name: str, layer: gpu.Layer, x: torch.Tensor) -> str:
    """Which body ran."""
    if name in gpu.FLAT:
        return runtime.linear_flat4.choose(
            x, layer.codes[0], layer.scales[0], *gpu.FLAT[name], None
        )[0]
    return runtime.linear_tiles.choose(x, layer.codes[0], layer.scales[0], *gpu.TILED[name], None)[
        0
    ]


def measure(name: str, n: int, k: int, rows: list[int]) -> tuple[list[dict], list[dict]]:
    """Rows of linear.csv and of peers.csv for one layer."""
    layer, ours, others = gpu.layer(name, n, k), [], []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        calls, plain = layer.linears(name, x), layer.plain_linears(x)
        case = {"kind": name, "N": n, "K": k, "M": m}
        row = {**case, "backend": backend(name, layer, x),
               "ms": gpu.graph_time(calls), "bf16_ms": gpu.graph_time(plain),
               "decoded_ms": gpu.graph_time(layer.fallbacks(name, x)),
               "plain_ms": gpu.eager_time(calls), "bf16_plain_ms": gpu.eager_time(plain)}  # fmt: skip
        ours.append(row)
        print(f"{name:<15}{n}x{k} M={m:<5} {row['backend']:<11}{row['ms']:.4f}  bf16 {row['bf16_ms'] / row['ms']:.2f}x  "
              f"decoded {row['decoded_ms'] / row['ms']:.2f}x  plain {row['bf16_plain_ms'] / row['plain_ms']:.2f}x",
              flush=True)  # fmt: skip
        for peer in peers.installed(peers.LINEAR, name):
            if reason := peer.why_not(layer, x):
                print(f"    {peer.label}: not measured: {reason}", flush=True)
                continue
            calls = peer.build(layer, x)
            ms, words = peers.captured_ms(calls)
            other = {**case, "peer": peer.label, "ms": ms, "plain_ms": gpu.eager_time(calls),
                     "ours_ms": row["ms"], "ours_plain_ms": row["plain_ms"]}  # fmt: skip
            others.append(other)
            ratio = f", ours {ms / row['ms']:.2f}x" if ms else ""
            print(f"    {peer.label}: {words}{ratio}; "
                  f"plain {other['plain_ms']:.4f}, ours {other['plain_ms'] / row['plain_ms']:.2f}x", flush=True)  # fmt: skip
    return ours, others


def append(path: Path, rows: list[dict]) -> None:
    """Rows to a CSV with the device and the versions in front; floats keep five digits.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    where = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    columns = [*where, *rows[0]]
    if (
        not new
        and (found := path.read_text(encoding="utf-8").splitlines()[0].split(",")) != columns
    ):
        raise ValueError(
            f"{path.name} has the columns {found}, these rows have {columns}; move the file away"
        )
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    **where,
                    **{
                        key: round(value, 5) if isinstance(value, float) else value
                        for key, value in row.items()
                    },
                }
            )


def size(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", help="a kind of codes; repeatable")
    parser.add_argument("--rows", type=int, nargs="+", default=list(gpu.ROWS))
    parser.add_argument(
        "--shapes", type=size, nargs="+", default=list(gpu.SHAPES), help="NxK of the weights"
    )
    args = parser.parse_args()
    gpu.end_without_gpu()
    for reason in peers.missing():
        print(reason)
    for name in args.only or [*gpu.TILED, *gpu.FLAT]:
        for n, k in args.shapes:
            ours, others = measure(name, n, k, args.rows)
            append(RESULTS / "linear.csv", ours)
            append(RESULTS / "peers.csv", others)


if __name__ == "__main__":
    main()
