"""Calibration on a GPU: seconds of a layer and of a 12B model, and what watching costs while a model samples.

    python3 dev.py bench calibration_gpu [layer] [model] [watch] [--formats bnb_nf4,nvfp4] [--method gptq]

`layer`: one correlated layer, 3072 x 12288, 4096 rows seen in two halves; output error on 2048 other rows, x nearest's.
`model`: a file of 3 double and 6 single Flux blocks, and a calibration as large as a 12B model's: the conversion, and
6.33 times that, 19 and 38 blocks. `watch`: runs of 20 evaluations in ComfyUI, of those blocks and of the emoji model,
watched and not watched in turns. Appends to results/calibration_<part>.csv. `--device cpu --size 256x1024 --hidden 256
--evaluations 2` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

import torch
from linear import append, size
from support import bench_layers as gpu
from support.helpers import EMOJI, flux_shapes
from support.layers import correlated_rows, heavy_weight

from fewbits.quant_ops.calibration import Calibration, InputStatistics, Observer
from fewbits.quant_ops.calibration.statistics import Half
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.methods import Inputs, Layer, choose, get_method, layer_generator
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import LayerInput

RESULTS = Path(__file__).parent / "results"
PARTS = ("layer", "model", "watch")
FORMATS = (
    "float8_e4m3fn", "float8_e4m3fn_rowwise", "int8_tensorwise", "int8_tensorwise:convrot=true", "int8_blockwise",
    "int8_lodewise", "bnb_nf4", "nvfp4", "mxfp8", "asym_w4a8_int8",
)  # fmt: skip
OF_A_MODEL = ("int8_tensorwise:convrot=true", "bnb_nf4", "asym_w4a8_int8")
SEEN, OTHERS = 4096, 2048  # rows
DOUBLE, SINGLE, TIMES = 3, 6, 19 / 3  # so many blocks, and how often a whole Flux has them
MEMORY = 10**9  # the node's default


def now(device: torch.device) -> float:
    """Seconds, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    begin = now(device)
    work()
    return now(device) - begin


@dataclass(frozen=True)
class Case:
    """A layer, what was seen of its inputs, and other rows of them."""

    weight: torch.Tensor
    inputs: Inputs
    others: torch.Tensor

    @classmethod
    def drawn(cls, n: int, k: int, device: torch.device) -> Case:
        rows = correlated_rows(k, SEEN + OTHERS, device=device)
        first, second = (half / len(half) ** 0.5 for half in rows[:SEEN].chunk(2))
        inputs = Inputs((first, second), (SEEN // 2, SEEN // 2))
        return cls(heavy_weight(n, k, device=device).bfloat16(), inputs, rows[SEEN:])

    def row(self, text: str, method: str, repeats: int) -> dict:
        """A format's seconds; the first run, which compiles kernels, apart."""
        wish, device = parse_wish(text), self.weight.device
        format, options = get_format(wish.format), wish.options
        weight, others = (format.prepare(part, options) for part in (self.weight, self.others))
        inputs = self.inputs.map(lambda rows: format.prepare(rows, options))
        grid = format.grid(LayerInput(tuple(self.weight.shape), "BF16"), options)
        chosen = get_method(method)

        def run():
            generator = layer_generator(0, "layer", device)
            return choose(
                chosen, Layer(weight, grid, chosen.configure({}), generator, inputs=inputs)
            )

        first, *others_s = (seconds_of(run, device) for _ in range(repeats + 1))
        choice = run()
        own, nearest = (
            float((others @ (grid.decode(*codes) - weight.float()).T).norm())
            for codes in ((choice.codes, choice.scale), grid.nearest(weight))
        )
        return {
            "format": text,
            "method": method,
            "n": len(weight),
            "k": weight.shape[1],
            "rows": SEEN,
            "seconds": statistics.median(others_s),
            "first_s": first,
            "held_out": own / nearest,
            "verdict": choice.verdict,
        }


def measure_layers(args: argparse.Namespace, device: torch.device) -> None:
    case = Case.drawn(*args.size, device)
    for text in args.formats or FORMATS:
        row = case.row(text, args.method, args.repeats)
        print(
            f"{text:<32}{row['seconds']:8.3f} s (first {row['first_s']:.1f}), output error on other "
            f"rows {row['held_out']:.3f} x nearest's {row['verdict']}",
            flush=True,
        )
        append(RESULTS / "calibration_layer.csv", [row])


def drawn_calibration(hidden: int, device: torch.device) -> Calibration:
    """Every layer of the blocks, each with an input of its own; rows as the node keeps of 12B."""
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in flux_shapes(hidden, DOUBLE, SINGLE).items()
        if len(shape) == 2 and "blocks" in name
    }
    columns = TIMES * sum(k for _, k in layers.values())
    capacity = int(MEMORY / (2 * 2 * columns))
    made = Calibration()
    for name, (n, k) in layers.items():
        rows = correlated_rows(k, 2 * capacity, seed=len(made.layers), device=device)
        moments = rows.sum(0), rows.square().sum(0), rows.abs().amax(0)
        halves = [Half(capacity, None, [half.bfloat16().cpu()]) for half in rows.chunk(2)]
        made.layers[name] = (len(made.inputs), n, k)
        made.inputs.append(
            InputStatistics(k, capacity, *(part.cpu() for part in moments), halves=tuple(halves))
        )
    return made


def measure_models(args: argparse.Namespace, device: torch.device) -> None:
    calibration = drawn_calibration(args.hidden, device)
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as folder:
        source, target = (Path(folder) / f"{name}.safetensors" for name in ("model", "small"))
        gpu.write_flux(source, (DOUBLE, SINGLE), args.hidden, device)

        def convert(text: str) -> None:
            recipe = Recipe(parse_wish(f"{text}{',' if ':' in text else ':'}method={args.method}"))
            quantize_file(
                source,
                target,
                recipe,
                overwrite=True,
                device=device,
                calibration=calibration,
            )

        for text in args.formats or OF_A_MODEL:
            first, seconds = (seconds_of(lambda: convert(text), device) for _ in range(2))
            row = {"format": text, "method": args.method, "double": DOUBLE, "single": SINGLE}
            row |= {"rows": 2 * calibration.inputs[0].capacity, "seconds": seconds}
            row |= {"first_s": first, "model_s": first + (TIMES - 1) * seconds}
            print(
                f"{text:<32}{seconds:8.1f} s (first {first:.1f}), a whole model "
                f"{row['model_s'] / 60:.1f} minutes",
                flush=True,
            )
            append(RESULTS / "calibration_model.csv", [row])


def measure_watching(args: argparse.Namespace, device: torch.device) -> None:
    sys.path.insert(0, os.environ["FEWBITS_COMFYUI"])  # dev.py sets it
    import comfy.cli_args

    comfy.cli_args.args.cpu = device.type == "cpu"
    from blocks import load, sample

    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as folder, torch.inference_mode():
        path = Path(folder) / "model.safetensors"
        gpu.write_flux(path, (DOUBLE, SINGLE), args.hidden, device)
        blocks = load(path)
        for pixels in args.pixels:
            record_watching(
                f"flux {DOUBLE}+{SINGLE} {pixels}",
                blocks,
                lambda pixels=pixels: [blocks(pixels, device) for _ in range(args.evaluations)],
                args,
                device,
            )
        emoji = load(EMOJI)
        record_watching("emoji", emoji, lambda: sample(emoji, device), args, device)


def record_watching(
    name: str,
    model: object,
    run: Callable[[], object],
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Medians of runs in turns; each watched one adds to one calibration, as prompts do."""
    observer, part = Observer(MEMORY), model.patcher.model
    plain, watched = [], []
    evaluate = part.apply_model

    def evaluate_watched(*inputs: object, **named: object) -> object:
        with observer.watching(part.diffusion_model):
            return evaluate(*inputs, **named)

    @contextlib.contextmanager
    def watching():
        observer.start_run()
        part.apply_model = evaluate_watched
        try:
            yield
        finally:
            del part.apply_model

    for _ in range(args.repeats + 1):
        plain.append(seconds_of(run, device))
        with watching():
            watched.append(seconds_of(run, device))
    taken = seconds_of(observer.finish, device)
    alone, beside = (statistics.median(seconds[1:]) for seconds in (plain, watched))
    row = {"model": name, "run_s": alone, "watched_s": beside, "cost": beside / alone - 1}
    row |= {"first_cost": watched[0] / plain[-1] - 1, "finish_s": taken}
    row |= {"inputs": len(observer.calibration.inputs), "rows": observer.calibration.rows}
    print(
        f"{name:<20} {alone:.3f} s, watched {beside:.3f}: {row['cost']:.1%} (the first run "
        f"{row['first_cost']:.1%})",
        flush=True,
    )
    append(RESULTS / "calibration_watch.csv", [row])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--formats", type=lambda text: text.split(","))
    parser.add_argument("--method", default="gptq", choices=("gptq", "adaround"))
    parser.add_argument("--size", type=size, default=(3072, 12288), help="of the layer, NxK")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--pixels", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = torch.device(args.device)
    if device.type == "cuda":
        gpu.end_without_gpu()
    measures = dict(zip(PARTS, (measure_layers, measure_models, measure_watching), strict=True))
    for part in args.parts or PARTS:
        measures[part](args, device)


if __name__ == "__main__":
    main()
