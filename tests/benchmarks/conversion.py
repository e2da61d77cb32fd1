"""File conversion against `cp` of the same file, peak memory, and planning a 24 GB header; ratios in one run.

    python tests/benchmarks/conversion.py [--scale 1] [--formats float8_e4m3fn,int8_tensorwise] [--repeats 3]

Prints one row per case and appends it to results/conversion.csv. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1] / "import_shim"), str(Path(__file__).parents[1])]

import torch

from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.pipeline import plan_source
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.results import append

RESULTS = Path(__file__).parent / "results" / "conversion.csv"
LIMITS = {"float8_e4m3fn": 5.0, "int8_tensorwise": 5.0, "bnb_nf4": 10.0}  # x cp, imports included
START = "import fewbits.quant_ops.doors"  # with torch, which --help does without
BLOCK = {  # one Flux double block and one single block at hidden 3072: 454 M parameters
    "double_blocks.{i}.img_attn.qkv": (9216, 3072), "double_blocks.{i}.img_attn.proj": (3072, 3072),
    "double_blocks.{i}.img_mlp.0": (12288, 3072), "double_blocks.{i}.img_mlp.2": (3072, 12288),
    "double_blocks.{i}.img_mod.lin": (18432, 3072), "single_blocks.{i}.linear1": (21504, 3072),
    "single_blocks.{i}.linear2": (3072, 15360), "double_blocks.{i}.txt_attn.qkv": (9216, 3072),
    "double_blocks.{i}.txt_mlp.0": (12288, 3072), "double_blocks.{i}.txt_mlp.2": (3072, 12288),
    "double_blocks.{i}.txt_mod.lin": (18432, 3072), "double_blocks.{i}.txt_attn.proj": (3072, 3072),
}  # fmt: skip


def flux_shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Flux-like model: 0.91 GB of bf16 per block."""
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (3072, 64),
        "vector_in.in_layer.weight": (3072, 768),
    }
    for i in range(blocks):
        for name, shape in BLOCK.items():
            shapes[f"{name.format(i=i)}.weight"] = shape
            shapes[f"{name.format(i=i)}.bias"] = shape[:1]
    return shapes


def write_model(path: Path, shapes: dict[str, tuple[int, ...]], *, sparse: bool = False) -> None:
    """A bf16 checkpoint of seeded normal weights; `sparse` leaves the data as a hole."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + offset)
            return
        for shape in shapes.values():
            weight = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            file.write(weight.view(torch.int16).numpy().tobytes())


class Usage(NamedTuple):
    """What one child process took, by the operating system's own account."""

    seconds: float
    peak_bytes: int
    user_seconds: float
    system_seconds: float


def run_child(arguments: list[str]) -> Usage:
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{arguments} failed with status {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(seconds, usage.ru_maxrss * unit, usage.ru_utime, usage.ru_stime)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fewbits.quant_ops.cli", *map(str, arguments)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1, help="file size in units of 2.7 GB")
    parser.add_argument("--formats", default="float8_e4m3fn,int8_tensorwise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to work (needs three times the file size)"
    )
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="fewbits-bench-") as folder:
        folder = Path(folder)
        bench_plan(folder)
        model = folder / "model.safetensors"
        # elsewhere: on Linux the peak of a child is at least that of its parent
        writer = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(model, flux_shapes(3 * args.scale))
        )
        writer.start()
        writer.join()
        for name in args.formats.split(","):
            rows.append(bench_format(folder, model, name, args.repeats))
    append(RESULTS, rows)


def bench_plan(folder: Path) -> None:
    """Time of a plan over a 24 GB header, after imports."""
    sparse = folder / "flux24.safetensors"
    write_model(sparse, flux_shapes(27), sparse=True)
    size = sparse.stat().st_size
    times = []
    for _ in range(5):
        started = time.perf_counter()
        with FileSource(sparse) as source:
            plan = plan_source(source, Recipe(parse_wish("int8_tensorwise")))
        json.dumps(plan.to_json())
        times.append(time.perf_counter() - started)
    sparse.unlink()
    print(
        f"plan of {size / 1e9:.1f} GB ({len(plan.layers)} tensors): {statistics.median(times):.3f} s after imports (limit 0.5)"
    )


def bench_format(folder: Path, model: Path, name: str, repeats: int) -> dict:
    """cp and conversion in turn, each without the other's output on disk; medians, ratio pair by pair.

    `seconds` is the whole process; what it takes to start Python and import torch is measured apart.
    """
    out, copy = folder / "out.safetensors", folder / "copy.safetensors"
    size = model.stat().st_size
    largest = max(torch.Size(shape).numel() for shape in BLOCK.values()) * 2
    copies, runs, starts = [], [], []
    for _ in range(repeats + 1):  # the first round warms the page cache
        copies.append(
            run_child(["cp", str(model), str(copy)]).seconds
            if shutil.which("cp")
            else _python_copy(model, copy)
        )
        copy.unlink()
        starts.append(run_child([sys.executable, "-c", START]))
        runs.append(run_child(command("quantize", model, "-o", out, "--format", name, "--quiet")))
        out.unlink()
    seconds, peaks, users, systems = zip(*runs[1:], strict=True)
    _, _, start_users, start_systems = zip(*starts[1:], strict=True)
    user = statistics.median(users) - statistics.median(start_users)
    system = statistics.median(systems) - statistics.median(start_systems)
    ratios = [run / cp for run, cp in zip(seconds, copies[1:], strict=True)]
    ratio, limit = statistics.median(ratios), LIMITS.get(name, 5.0)
    start = statistics.median(each.seconds for each in starts[1:])
    alone = statistics.median(
        (run - start) / cp for run, cp in zip(seconds, copies[1:], strict=True)
    )
    allowed = 700e6 + 3 * largest
    print(
        f"{name}: {size / 1e9:.2f} GB in {statistics.median(seconds):.2f} s, cp {statistics.median(copies[1:]):.2f} s, "
        f"ratio {ratio:.2f} ({min(ratios):.2f}..{max(ratios):.2f}, limit {limit:.0f}), {alone:.2f} without the "
        f"{start:.2f} s of imports; CPU without them {user:.2f} s and {system:.2f} s in the system; "
        f"peak {max(peaks) / 1e6:.0f} MB (limit {allowed / 1e6:.0f})"
    )
    return {
        "format": name,
        "bytes": size,
        "seconds": round(statistics.median(seconds), 3),
        "cp_seconds": round(statistics.median(copies[1:]), 3),
        "ratio": round(ratio, 3),
        "start_seconds": round(start, 3),
        "ratio_without_start": round(alone, 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "peak_bytes": max(peaks),
        "peak_limit_bytes": int(allowed),
        "repeats": repeats,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "user_seconds_without_start": round(user, 3),
        "system_seconds_without_start": round(system, 3),
    }


def _python_copy(model: Path, copy: Path) -> float:
    started = time.perf_counter()
    shutil.copyfile(model, copy)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
