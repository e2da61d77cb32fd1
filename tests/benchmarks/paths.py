"""Every path of every kind of codes on a GPU, timed against bf16: what the rows of kernels/choice.py are written from.

    python3 dev.py bench paths [--kinds bnb_nf4 mxfp8] [--rows 64 1024] [--shapes 12288x3072]

Milliseconds in captured graphs, over copies that exceed the cache, x quantized where the path does; appends to
results/paths.csv.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

import torch
from linear import append, size
from support import bench_layers as gpu

from fewbits.quant_ops.bench import quantized_layer
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.planning.recipe import parse_wish
from fewbits.quant_ops.spec import LayerInput

RESULTS = Path(__file__).parent / "results" / "paths.csv"
KINDS = (
    "bnb_nf4", "nvfp4", "asym_w4a8_int8", "mxfp8", "int8_tensorwise",
    "int8_blockwise", "int8_blockwise:block_size=64", "int8_lodewise", "int8_lodewise:block_size=64",
    "float8_e4m3fn", "float8_e4m3fn_blockwise", "float8_e4m3fn_blockwise:block_size=128",
)  # fmt: skip
ROWS = (16, 64, 256, 512, 1024, 1536, 4608)
SHAPES = ((12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360), (3072, 3072), (9216, 3072))


def copies_of(wish: str, weight: torch.Tensor) -> list[tuple]:
    """(op, its arguments) of copies of a weight that exceed the cache together."""
    parsed = parse_wish(wish)
    format = get_format(parsed.format)
    options = parsed.options
    layer = LayerInput(tuple(weight.shape), "BF16")
    stored = quantized_layer(format, weight, options)
    nbytes = sum(tensor.nbytes for tensor in stored.values())
    made = []
    for _ in range(max(2, min(16, int(2.5 * gpu.CACHE // nbytes)))):
        copy = {suffix: tensor.clone() for suffix, tensor in stored.items()}
        made.append(format.product(copy, layer, options))
    return made


def measure(wish: str, n: int, k: int, rows: list[int]) -> list[dict]:
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
    copies, plain = copies_of(wish, weight), [weight.clone() for _ in range(3)]
    found = []
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        dense = gpu.graph_time([partial(torch.nn.functional.linear, x, w) for w in plain], 3)
        op, arguments = copies[0]
        chosen = op.decide(x, *arguments, None).backend
        for name, (body, why_not) in op.backends.items():
            if why_not(x, *arguments, None):
                continue
            ms = gpu.graph_time([partial(body, x, *a, None) for _, a in copies], 3)
            row = {"kind": wish, "N": n, "K": k, "M": m, "path": name}
            found.append({**row, "chosen": chosen == name, "ms": ms, "bf16_ms": dense})
        line = "  ".join(
            f"{r['path']}{'*' * r['chosen']} {r['bf16_ms'] / r['ms']:.2f}"
            for r in found
            if r["M"] == m
        )
        print(f"{wish:<32}{n}x{k} M={m:<5} bf16 {dense:.4f}  {line}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="NAME:option=value")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", type=size, nargs="+", default=list(SHAPES), help="NxK")
    args = parser.parse_args()
    gpu.end_without_gpu()
    for wish in args.kinds:
        for n, k in args.shapes:
            append(RESULTS, measure(wish, n, k, args.rows))


if __name__ == "__main__":
    main()
