"""What the report of a conversion costs: seconds with it over seconds without, turn by turn in one process.

    python tests/benchmarks/report_cost.py [--turns 5]

A random bf16 model of four 12288x3072 layers, converted on the CPU. Without: no deviation is measured, no codes are counted
and no file is written beside the model. Prints the median of the ratios of CPU seconds and of wall seconds. Asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "import_shim"), str(HERE.parent)]

import torch
from safetensors.torch import save_file

from fewbits.kernels.grids import Grid
from fewbits.quant_ops import pipeline
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.methods.base import NOTHING
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

FORMATS = ("float8_e4m3fn", "int8_tensorwise", "bnb_nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        weights = {f"layers.{i}.weight": torch.randn(12288, 3072).bfloat16() for i in range(4)}
        save_file(weights, model)
        for text in FORMATS:
            recipe = Recipe(parse_wish(text), preset="none")
            seconds(model, recipe, report=True)
            pairs = [
                (seconds(model, recipe, report=True), seconds(model, recipe, report=False))
                for _ in range(turns)
            ]
            cpu, wall = (
                statistics.median(with_[i] / without[i] for with_, without in pairs) for i in (0, 1)
            )
            print(f"{text}: CPU {cpu:.3f} x, wall {wall:.3f} x, {turns} turns", flush=True)


def seconds(model: Path, recipe: Recipe, *, report: bool) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of one conversion."""
    grids = [] if report else [each for each in every(Grid) if "measured" in vars(each)]
    patches = [mock.patch.object(each, "measured", unmeasured) for each in grids]
    if not report:
        patches.append(mock.patch.object(pipeline, "saturated", lambda *_: 0))
    for patch in patches:
        patch.start()
    begin = time.process_time(), time.perf_counter()
    try:
        out = model.with_name("out.safetensors")
        quantize_file(model, out, recipe, overwrite=True, sidecar=report)
    finally:
        for patch in patches:
            patch.stop()
    return time.process_time() - begin[0], time.perf_counter() - begin[1]


def unmeasured(grid: Grid, weight: torch.Tensor) -> tuple:
    return *grid.nearest(weight), NOTHING


def every(kind: type) -> list[type]:
    """A class and all that are made of it."""
    return [kind, *(found for sub in kind.__subclasses__() for found in every(sub))]


if __name__ == "__main__":
    main()
