"""What a calibration is worth: output error of gptq x nearest's, on prompts that it never saw.

    python tests/benchmarks/calibration.py [--formats bnb_nf4,...] [--device cuda]

The emoji model; statistics from 32 prompts in two halves, errors on the activations of 32 others, 16 steps, cfg 3. Means
over the layers, weighted by their parameters. Appends a row per format to results/calibration.csv. Asserts nothing.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "import_shim"), str(HERE.parent)]

import torch

from fewbits.quant_ops.calibration import Observer
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.methods import Layer, choose, get_method, layer_generator
from fewbits.quant_ops.planning.recipe import parse_wish
from fewbits.quant_ops.spec import LayerInput
from support.layers import emoji_trainer, emoji_weights

RESULTS = HERE / "results" / "calibration.csv"
FORMATS = (
    "float8_e4m3fn,int8_tensorwise:convrot=false,int8_tensorwise:convrot=true,int8_blockwise,bnb_nf4,nvfp4,"
    "asym_w4a8_int8"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    train, model, prompts = emoji_trainer(args.device)
    seen, unseen = Observer(10**9), Observer(10**9)
    for observer, part in ((seen, prompts[:32]), (unseen, prompts[32:64])):
        observer.start_run()
        for start in (0, 16):
            observer.start_run()
            conditioning = train.conditioning(part[start : start + 16], args.device)
            with observer.watching(model):
                train.sample(model, *conditioning, 16, 3.0, 1 + start, args.device)
    known, held = seen.finish(), unseen.finish()
    for text in args.formats.split(","):
        wish = parse_wish(text)
        started, total, parameters, worst = time.perf_counter(), 0.0, 0, 0.0
        for name, weight in emoji_weights(wish).items():
            ratio = measure(
                name,
                weight.to(device),
                wish,
                known,
                held.inputs_of(name, tuple(weight.shape), device).gram,
            )
            total, worst = total + ratio * weight.numel(), max(worst, ratio)
            parameters += weight.numel()
        row = {
            "format": text,
            "held_out": f"{total / parameters:.3f}",
            "worst_layer": f"{worst:.3f}",
            "seconds": f"{time.perf_counter() - started:.0f}",
            "device": args.device,
        }
        print(row, flush=True)
        record(row)


def measure(name: str, weight: torch.Tensor, wish, known, gram: torch.Tensor) -> float:
    """Output error of gptq x nearest's, for inputs of this second moment."""
    format, options, method = get_format(wish.format), wish.options, get_method("gptq")
    layer = LayerInput(tuple(weight.shape), "BF16")
    grid, prepared = format.grid(layer, options), format.prepare(weight, options)
    inputs = known.inputs_of(name, tuple(weight.shape), weight.device).map(
        lambda rows: format.prepare(rows, options)
    )
    generator = layer_generator(0, name, weight.device)
    choice = choose(method, Layer(prepared, grid, method.configure({}), generator, inputs=inputs))
    errors = []
    for codes in ((choice.codes, choice.scale), grid.nearest(prepared)):
        decoded = format.dequantize(format.pack(*codes, options), layer, options)
        error = decoded - weight.float()
        errors.append(float(((error @ gram) * error).sum()))
    return (errors[0] / errors[1]) ** 0.5


def record(row: dict) -> None:
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
