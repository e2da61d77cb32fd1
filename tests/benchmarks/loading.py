"""Loading our files against a native FP8 file of the same size, and the memory a loaded model takes; ratios in one run.

    python3 dev.py bench loading [--megabytes 600] [--formats bnb_nf4,int8_blockwise] [--turns 15]

ComfyUI's own loader opens Flux models on the CPU, all files in turns; the fastest load of each counts. ComfyUI maps
files, so a load ends here when every page was touched; `open` is the part before that. Resident memory is what a process
of its own has grown by then. On a CPU ComfyUI keeps what is not quantized as float32 beside the mapped bf16: that is the
remainder. Prints one row per format and appends it to results/loading.csv. Asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "import_shim"), str(Path(__file__).parents[1])]

from fewbits.quant_ops.checkpoint.writer import FileSink
from fewbits.quant_ops.formats.base import marker_bytes
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.sources import TORCH_DTYPES
from fewbits.quant_ops.spec import Header, ModelPlan, TensorSpec
from support.helpers import flux_shapes
from support.results import append

RESULTS = Path(__file__).parent / "results" / "loading.csv"
NATIVE, HIDDEN = "float8_e4m3fn", 3072
FORMATS = "int8_tensorwise,int8_blockwise,float8_e4m3fn_rowwise,bnb_nf4"
TIME_LIMIT, MEMORY_LIMIT = 1.1, 1.05
PAGE = 4096


def plan_of(size: int, format: str) -> ModelPlan:
    """A Flux with as many single blocks as fill `size` bytes in this format."""

    def plan(blocks: int) -> ModelPlan:
        shapes = flux_shapes(HIDDEN, 1, blocks)
        return make_plan(
            Header({n: TensorSpec(n, "BF16", s) for n, s in shapes.items()}),
            Recipe(parse_wish(format)),
        )

    one, two = plan(1).bytes_after, plan(2).bytes_after
    return plan(max(1, round((size - one) / (two - one)) + 1))


def write(plan: ModelPlan, path: Path) -> None:
    """The planned file with arbitrary codes: loading does not look at values."""
    block = torch.randint(
        0, 128, (1 << 20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    sink = FileSink(path)
    sink.open(plan)
    for layer in plan.layers:
        for spec in layer.outputs:
            if spec.name.endswith(".comfy_quant"):
                value = torch.frombuffer(bytearray(marker_bytes(layer.marker)), dtype=torch.uint8)
            elif spec.dtype in ("BF16", "F32"):
                value = torch.full(spec.shape, 0.01, dtype=TORCH_DTYPES[spec.dtype])
            else:
                value = block.repeat(-(-spec.numel // block.numel()))[: spec.numel]
                value = value.view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
            sink.write(spec.name, value)
    sink.commit()


def remainder(plan: ModelPlan) -> int:
    """Bytes of what is not quantized, as float32."""
    return 2 * sum(
        spec.nbytes for layer in plan.layers for spec in layer.outputs if spec.dtype == "BF16"
    )


def child(paths: list[str], turns: int) -> None:
    """Load files in turns; print, as JSON, (seconds, seconds until it was open, bytes grown by) of every load."""
    sys.path.insert(0, os.environ["FEWBITS_COMFYUI"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd
    import psutil

    import fewbits.nodes.bridge

    fewbits.nodes.bridge.register()
    for path in paths:
        with open(path, "rb") as file:  # into the page cache
            while file.read(1 << 24):
                pass
    process = psutil.Process()

    def load(path: str) -> tuple[float, float, int]:
        gc.collect()
        before, started = process.memory_info().rss, time.perf_counter()
        model = comfy.sd.load_diffusion_model(path)
        opened = time.perf_counter() - started
        for tensor in model.model.state_dict().values():
            tensor.reshape(-1).view(torch.uint8)[::PAGE].max()
        seconds = time.perf_counter() - started
        gc.collect()
        return seconds, opened, process.memory_info().rss - before

    with torch.inference_mode():
        print(json.dumps([[load(path) for path in paths] for _ in range(turns)]))


def measure(paths: Iterable[Path], turns: int) -> list[list[tuple[float, float, int]]]:
    command = [sys.executable, __file__, "--turns", str(turns), "--child", *map(str, paths)]
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=600, help="size of each file")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--turns", type=int, default=15, help="loads of each file")
    parser.add_argument("--folder", type=Path, help="where to write the files")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.turns)
        return
    names = [NATIVE, *args.formats.split(",")]
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="fewbits-bench-") as folder:
        plans = {name: plan_of(args.megabytes * 1_000_000, name) for name in names}
        files = {name: Path(folder) / f"{name}.safetensors" for name in names}
        for name in names:
            write(plans[name], files[name])
        sizes = {name: path.stat().st_size for name, path in files.items()}
        timed = dict(
            zip(names, zip(*measure(files.values(), args.turns), strict=True), strict=True)
        )
        grown = {
            name: measure([path], 2)[1][0][2] for name, path in files.items()
        }  # alone; lazy imports are over
    rows = [row_of(name, plans[name], sizes, timed, grown[name]) for name in names]
    append(RESULTS, rows)


def row_of(
    name: str, plan: ModelPlan, sizes: dict[str, int], timed: dict[str, tuple], grown: int
) -> dict:
    """The fastest loads of this file and of the native one, per byte; the median is that of the single turns."""
    size = sizes[name]
    scale = sizes[NATIVE] / size
    turns = [
        scale * ours[0] / native[0] for ours, native in zip(timed[name], timed[NATIVE], strict=True)
    ]
    seconds, opened = (min(load[i] for load in timed[name]) for i in (0, 1))
    ratio = scale * seconds / min(load[0] for load in timed[NATIVE])
    expected = size + remainder(plan)
    print(
        f"{name:<24} {size / 1e6:.0f} MB in {seconds:.3f} s (open {opened:.3f} s), x{ratio:.2f} of native FP8 (median "
        f"turn {statistics.median(turns):.2f}, limit {TIME_LIMIT}); grew by {grown / 1e6:.0f} MB, "
        f"x{grown / expected:.3f} of file + remainder {expected / 1e6:.0f} MB (limit {MEMORY_LIMIT})"
    )
    return {
        "format": name,
        "bytes": size,
        "layers": sum(layer.format is not None for layer in plan.layers),
        "seconds": round(seconds, 4),
        "open_seconds": round(opened, 4),
        "ratio": round(ratio, 3),
        "ratio_median_turn": round(statistics.median(turns), 3),
        "grown_bytes": grown,
        "expected_bytes": expected,
        "grown_ratio": round(grown / expected, 4),
        "turns": len(turns),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
