"""A random Flux.1 through ComfyUI's own loader and denoiser, in every format, against bf16 in the same process.

    python3 dev.py bench whole_model [--formats bnb_nf4,int8_tensorwise:convrot=true] [--double 19 --single 38]
    python3 dev.py bench whole_model --compiled --double 2 --single 4 --pixels 512 1024 768

One denoiser evaluation per picture size, bf16 and the format in turns: a plain call, the GPU alone (launched ahead), and
Python alone, in microseconds per quantized layer, while the GPU is kept waiting. Appends to results/whole_model.csv.
Python alone is measured up to about 12 blocks: the GPU holds no more launches than that. `--compiled` measures plain calls
of the compiled model against compiled bf16, sizes in turn as a user changes them; appends to results/compiled.csv.
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
from collections.abc import Iterator
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
COMPILED = RESULTS.with_name("compiled.csv")
FORMATS = (
    "float8_e4m3fn", "float8_e4m3fn_rowwise", "int8_tensorwise", "int8_tensorwise:scaling=tensor",
    "int8_tensorwise:convrot=true", "int8_blockwise", "int8_lodewise", "bnb_nf4", "bnb_fp4", "nvfp4", "mxfp8",
    "asym_w4a8_int8",
)  # fmt: skip
WAIT_CYCLES = 200_000_000  # the GPU waits .1 s: longer than Python takes
PYTHON_TURNS = 4
CUDA = torch.device("cuda")
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


@contextlib.contextmanager
def quantized(wish: str, source: Path) -> Iterator[Model]:
    """The file in one format, loaded; away from GPU and disk afterwards, where two of them may not fit."""
    path = source.with_name("quantized.safetensors")
    quantize_file(source, path, Recipe(primary=parse_wish(wish)), device=torch.device("cuda"))
    model = load(path)
    try:
        yield model
    finally:
        import comfy.model_management

        path.unlink()
        comfy.model_management.unload_model_and_clones(model.patcher)
        del model
        gc.collect()
        torch.cuda.empty_cache()


def measure(wish: str, model: Model, plain: Model, args: argparse.Namespace) -> list[dict]:
    """One row per picture size."""
    layers, rows = quantized_layers(model), []
    for size in args.pixels:
        own, reference = partial(model, size, CUDA), partial(plain, size, CUDA)
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
    return rows


@contextlib.contextmanager
def compiled(model: Model) -> Iterator[None]:
    """Inside, the denoiser is what ComfyUI's TorchCompileModel puts in its place."""
    from torch._dynamo.utils import counters

    eager = model.patcher.model.diffusion_model
    torch._dynamo.reset()
    counters.clear()
    model.patcher.model.diffusion_model = torch.compile(eager, backend="inductor")
    try:
        yield
    finally:
        model.patcher.model.diffusion_model = eager


def measure_compiled(wish: str, model: Model, args: argparse.Namespace) -> list[dict]:
    """One row per picture size, in the order that a user changes them; `first_s` holds what was compiled for it."""
    from torch._dynamo.utils import counters

    rows, eager = [], {size: model(size, CUDA) for size in args.pixels}
    with compiled(model):
        for size in args.pixels:
            own, begin = partial(model, size, CUDA), time.perf_counter()
            error = rel_l2(own(), eager[size])
            first = time.perf_counter() - begin
            times = timed({"": (contextlib.nullcontext, own)}, args.turns)
            graphs, breaks = counters["stats"]["unique_graphs"], len(counters["graph_break"])
            row = {"format": wish, "double": args.double, "single": args.single, "pixels": size}
            row |= {**times, "first_s": first, "graphs": graphs, "breaks": breaks}
            rows.append({**row, "rel_l2_to_eager": error})
            print(
                f"{wish:<32}{size:>5}: compiled {times['plain_ms']:.2f} ms, GPU alone {times['ms']:.2f} ms; first call "
                f"{first:.1f} s, {graphs} graphs, {breaks} breaks; to eager {error:.4f}",
                flush=True,
            )
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
    parser.add_argument("--compiled", action="store_true")
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
        if args.compiled:
            append(COMPILED, measure_compiled("bf16", plain, args))
        for wish in args.formats.split(","):
            with quantized(wish, source) as model:
                if args.compiled:
                    append(COMPILED, measure_compiled(wish, model, args))
                else:
                    append(RESULTS, measure(wish, model, plain, args))


if __name__ == "__main__":
    main()
