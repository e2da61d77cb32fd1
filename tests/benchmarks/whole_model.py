"""A random Flux.1 through ComfyUI's own loader and denoiser, in every format, against bf16 in the same process.

    python3 dev.py bench whole_model [--formats bnb_nf4,int8_tensorwise:convrot=true] [--double 19 --single 38]

One denoiser evaluation per picture size, bf16 and the format in turns: a plain call, the GPU alone (launched ahead), and
Python alone, in microseconds per quantized layer, while the GPU is kept waiting. Appends to results/whole_model.csv.
Python alone is measured up to about 12 blocks: the GPU holds no more launches than that.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

import torch
from blocks import HIDDEN, Model, load, rel_l2, timed
from linear import append
from support import bench_layers as gpu

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

RESULTS = Path(__file__).parent / "results" / "whole_model.csv"
FORMATS = (
    "float8_e4m3fn", "float8_e4m3fn_rowwise", "int8_tensorwise", "int8_tensorwise:scaling=tensor",
    "int8_tensorwise:convrot=true", "int8_blockwise", "int8_lodewise", "bnb_nf4", "bnb_fp4", "nvfp4", "mxfp8",
    "asym_w4a8_int8",
)  # fmt: skip
WAIT_CYCLES = 200_000_000  # the GPU waits .1 s: longer than Python takes
PYTHON_TURNS = 4
MOST_BLOCKS = 12  # whose launches the GPU holds while it waits


def python_ms(call: object, turns: int) -> float:
    """Median milliseconds that Python takes to launch an evaluation, while the GPU waits."""
    times = []
    for _ in range(turns):
        torch.cuda.synchronize()
        torch.cuda._sleep(WAIT_CYCLES)
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def quantized_layers(model: Model) -> int:
    parts = model.patcher.model.modules()
    return sum(getattr(part, "layout_type", None) is not None for part in parts)


def measure(wish: str, source: Path, plain: Model, args: argparse.Namespace) -> list[dict]:
    """One row per picture size."""
    path, device = source.with_name("quantized.safetensors"), torch.device("cuda")
    path.unlink(missing_ok=True)  # two of them may not fit
    quantize_file(source, path, Recipe(primary=parse_wish(wish)), device=device)
    model = load(path)
    layers, rows = quantized_layers(model), []
    for size in args.pixels:
        own, reference = partial(model, size, device), partial(plain, size, device)
        error = rel_l2(own(), reference())
        inside = contextlib.nullcontext
        times = timed({"": (inside, own), "bf16_": (inside, reference)}, args.turns)
        python = {"python_us": 0.0, "bf16_python_us": 0.0}
        if args.double + args.single <= MOST_BLOCKS:
            python = {
                "python_us": 1e3 * python_ms(own, PYTHON_TURNS) / layers,
                "bf16_python_us": 1e3 * python_ms(reference, PYTHON_TURNS) / layers,
            }
        row = {"format": wish, "double": args.double, "single": args.single, "pixels": size}
        rows.append({**row, "layers": layers, **times, **python, "rel_l2": error})
        plainly, alone = times["bf16_plain_ms"] / times["plain_ms"], times["bf16_ms"] / times["ms"]
        print(
            f"{wish:<32}{size:>5}: plain {plainly:.2f}x, GPU alone {alone:.2f}x of {times['bf16_ms']:.1f} ms; Python per "
            f"layer {python['python_us']:.0f} us, bf16 {python['bf16_python_us']:.0f}; rel_l2 {error:.4f}",
            flush=True,
        )
    import comfy.model_management

    comfy.model_management.unload_model_and_clones(model.patcher)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="NAME:option=value")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    args = parser.parse_args()
    gpu.end_without_gpu()
    sys.path.insert(0, os.environ["FEWBITS_COMFYUI"])  # dev.py sets it
    from fewbits.nodes import bridge

    import comfy.sd  # noqa: F401  ComfyUI is there before any pack

    bridge.register()
    off = {seam: reason for seam, reason in bridge.status().items() if reason}
    print(off or "all seams installed", flush=True)
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as folder, torch.inference_mode():
        source = Path(folder) / "flux.safetensors"
        gpu.write_flux(source, (args.double, args.single), HIDDEN, "cuda")
        plain = load(source)
        for wish in args.formats.split(","):
            append(RESULTS, measure(wish, source, plain, args))


if __name__ == "__main__":
    main()
