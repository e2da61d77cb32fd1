"""What the report of a conversion costs: CPU seconds, wall seconds and peak memory with it and without, turn by turn.

    python tests/benchmarks/report_cost.py [--turns 5]

A random bf16 model of eight 12288x3072 layers, converted on the CPU by a process of its own each time. Without: no deviation
is measured, no codes are counted and no file is written beside the model. `conversion` leaves out what it takes to start
Python and import torch, `command` has it. Prints medians, appends them to results/report_cost.csv. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
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
from support.results import append

FORMATS = ("float8_e4m3fn", "int8_tensorwise", "bnb_nf4")
LAYERS = 8
RESULTS = HERE / "results" / "report_cost.csv"
WHAT = ("conversion_cpu", "conversion_wall", "command_cpu", "peak_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # model, format, with or without
    args = parser.parse_args()
    if args.one:
        model, text, how = args.one
        print(json.dumps(converted(Path(model), text, report=how == "with")))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        weights = {f"layers.{i}.weight": torch.randn(12288, 3072).bfloat16() for i in range(LAYERS)}
        save_file(weights, model)
        del weights
        for text in FORMATS:
            rows.append(compared(model, text, args.turns))
    append(RESULTS, rows)


def compared(model: Path, text: str, turns: int) -> dict:
    """One row: medians with and without, and of the ratios of each turn."""
    pairs = [(apart(model, text, "with"), apart(model, text, "without")) for _ in range(turns)]
    row = {"format": text, "bytes": model.stat().st_size, "turns": turns}
    for what in WHAT:
        having, lacking = ([each[i][what] for each in pairs] for i in (0, 1))
        ratios = [a / b for a, b in zip(having, lacking, strict=True)]
        row[f"{what}_with"] = round(statistics.median(having), 3)
        row[f"{what}_without"] = round(statistics.median(lacking), 3)
        row[f"{what}_ratio"] = round(statistics.median(ratios), 3)
    row |= {"cores": os.cpu_count(), "torch": torch.__version__}
    shown = ", ".join(
        f"{what} {row[f'{what}_with']:g} / {row[f'{what}_without']:g} = {row[f'{what}_ratio']:.3f} x"
        for what in WHAT
    )
    print(f"{text}: {shown}", flush=True)
    return row


def apart(model: Path, text: str, how: str) -> dict[str, float]:
    """`converted` in a process of its own."""
    own = [sys.executable, __file__, "--one", str(model), text, how]
    return json.loads(subprocess.run(own, stdout=subprocess.PIPE, check=True).stdout)


def converted(model: Path, text: str, *, report: bool) -> dict[str, float]:
    """What one conversion took of this process."""
    recipe = Recipe(parse_wish(text), preset="none")
    conversion_cpu, conversion_wall = seconds(model, recipe, report=report)
    return {
        "conversion_cpu": conversion_cpu,
        "conversion_wall": conversion_wall,
        "command_cpu": time.process_time(),
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Peak resident memory of this process. On Linux `getrusage` also has its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
