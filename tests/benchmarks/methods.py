"""What a method's codes are worth against nearest: its objective, plain weight error, held-out output error, time.

    python tests/benchmarks/methods.py [--device cuda] [--sizes 3072x3072] [--formats bnb_nf4,...] [--options lr=0.5,...]

Layers: synthetic heavy-tailed ones, and the emoji model with activations of its own sampling loop (tests/layers.py).
Ratios x nearest; for the emoji model the worst layer and, in brackets, all layers together. Appends a row per case to
results/methods.csv. Asserts nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "import_shim"), str(HERE.parent)]

import torch
from support.layers import correlated_rows, emoji_activations, emoji_weights, heavy_weight
from support.results import append

from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.methods import Layer, choose, get_method, layer_generator
from fewbits.quant_ops.planning.recipe import Wish, parse_wish
from fewbits.quant_ops.sources import DTYPE_NAMES
from fewbits.quant_ops.spec import LayerInput

RESULTS = HERE / "results" / "methods.csv"
FORMATS = (
    "float8_e4m3fn,float8_e4m3fn_block3d,int8_tensorwise,int8_tensorwise:scaling=tensor,int8_blockwise,mxfp8,nvfp4,"
    "bnb_nf4,bnb_fp4,asym_w4a8_int8"
)


def measure(
    name: str, weight: torch.Tensor, inputs: torch.Tensor, wish: Wish, device: torch.device
) -> dict:
    """One layer: norms of the method's and of nearest's errors, and the seconds of the method with its guard."""
    format, options = get_format(wish.format), wish.options
    grid = format.grid(LayerInput(tuple(weight.shape), DTYPE_NAMES[weight.dtype]), options)
    prepared = format.prepare(weight.to(device), options)
    method = get_method(wish.method)
    settings = method.configure(dict(wish.method_options))

    def run() -> tuple:
        started = time.perf_counter()
        choice = choose(method, Layer(prepared, grid, settings, layer_generator(0, name, device)))
        _wait(device)
        return choice, time.perf_counter() - started

    choice, seconds = run()
    if device.type == "cuda":  # the first call also loads kernels
        choice, seconds = run()
    layer, x = LayerInput(tuple(weight.shape), None), inputs.to(device)
    ours = format.dequantize(format.pack(choice.codes, choice.scale, options), layer, options)
    plain = format.dequantize(format.pack(*grid.nearest(prepared), options), layer, options)
    reference = weight.to(device).float()
    return {
        "objective": choice.objective,
        "objective_nearest": choice.objective_nearest,
        "weight": float((ours - reference).norm()),
        "weight_nearest": float((plain - reference).norm()),
        "output": float((x @ (ours - reference).T).norm()),
        "output_nearest": float((x @ (plain - reference).T).norm()),
        "output_size": float((x @ reference.T).norm()),
        "seconds": seconds,
        "verdict": choice.verdict,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def summary(results: list[dict]) -> dict:
    """Worst layer and all layers together, for each of the three measures; largest time of a layer."""
    row = {}
    for measure in ("objective", "weight", "output"):
        pairs = [(r[measure], r[f"{measure}_nearest"]) for r in results]
        row[f"{measure}_worst"] = max(a / b for a, b in pairs)
        if (
            measure == "output"
        ):  # layers count by their relative error, not by how large their outputs are
            pairs = [
                (a / r["output_size"], b / r["output_size"]) for (a, b), r in zip(pairs, results)
            ]
        row[f"{measure}_all"] = math.sqrt(
            sum(a * a for a, _ in pairs) / sum(b * b for _, b in pairs)
        )
    row["seconds"] = max(r["seconds"] for r in results)
    row["fell_back"] = sum(bool(r["verdict"]) for r in results)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sizes", default="3072x3072", help="synthetic layers, N x K; empty for none"
    )
    parser.add_argument("--no-emoji", action="store_true")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--methods", default="mse_clip,svd")
    parser.add_argument("--options", default="", help="method options as name=value,name=value")
    args = parser.parse_args()
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(
        f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads; ratios x nearest"
    )
    print(
        f"{'layers':<12}{'format':<24}{'method':<10}{'objective':>15}{'weight':>17}{'output':>17}{'s/layer':>9}  nearest"
    )
    activations = {} if args.no_emoji else emoji_activations()
    for name in args.formats.split(","):
        for method in args.methods.split(","):
            options = f",{args.options}" if args.options else ""
            wish = parse_wish(f"{name}{',' if ':' in name else ':'}method={method}{options}")
            for size in filter(None, args.sizes.split(",")):
                n, k = map(int, size.split("x"))
                case = [measure(size, heavy_weight(n, k), correlated_rows(k, 4096), wish, device)]
                report(size, wish, case, where)
            if activations:
                weights = emoji_weights(wish)
                case = [
                    measure(layer, w, activations[layer], wish, device)
                    for layer, w in weights.items()
                ]
                report("emoji", wish, case, where)


def report(layers: str, wish: Wish, results: list[dict], where: str) -> None:
    row = summary(results)
    cells = [
        f"{row[f'{m}_worst']:.3f} ({row[f'{m}_all']:.3f})"
        for m in ("objective", "weight", "output")
    ]
    print(f"{layers:<12}{wish.format:<24}{wish.method:<10}{cells[0]:>15}{cells[1]:>17}{cells[2]:>17}"
          f"{row['seconds']:>9.2f}  {row['fell_back']} of {len(results)}", flush=True)  # fmt: skip
    fields = {
        "layers": layers,
        "wish": wish.to_text(),
        "count": len(results),
        "device": where,
        "torch": torch.__version__,
    }
    rounded = {key: round(value, 4) for key, value in row.items()}
    append(RESULTS, [{**fields, **rounded}])


if __name__ == "__main__":
    main()
