"""Calibration on a GPU: seconds of a layer and of a 12B model, and what watching costs while a model samples.

    python3 dev.py bench calibration_gpu [layer] [model] [watch] [--formats bnb_nf4,nvfp4] [--method gptq]

`layer`: one correlated layer, 3072 x 12288, 4096 rows seen in two halves; output error on 2048 other rows, x nearest's,
and in what the seconds are spent. Each kind of correlation in support/layers.py, all but the first in three formats; beside
it a sketch of gptq: damping of a hundredth, no passes. `model`: a file of 3 double and 6 single Flux blocks, and a calibration as large as a 12B model's: the conversion, and
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
from support.layers import KINDS, correlated_rows, heavy_weight

from fewbits.quant_ops.calibration import Calibration, InputStatistics, Observer
from fewbits.quant_ops.calibration.statistics import Half
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.methods import (
    Choice,
    Inputs,
    Layer,
    choose,
    felt,
    get_method,
    layer_generator,
    rounding,
)
from fewbits.quant_ops.methods.rounding import Rounding
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import LayerInput

RESULTS = Path(__file__).parent / "results"
PARTS = ("layer", "model", "watch")
FORMATS = (
    "float8_e4m3fn", "float8_e4m3fn_rowwise", "int8_tensorwise", "int8_tensorwise:convrot=true", "int8_blockwise",
    "int8_lodewise", "bnb_nf4", "nvfp4", "mxfp8", "asym_w4a8_int8",
)  # fmt: skip
OF_A_MODEL = ("int8_tensorwise:convrot=true", "bnb_nf4", "asym_w4a8_int8")
OF_OTHER_KINDS = ("float8_e4m3fn", "int8_blockwise", "bnb_nf4")
SKETCH = {"damping": 0.01, "passes": 0}
OTHERS = 2048  # rows; a third of the channels are seen
# What the seconds of gptq are spent in; the gram is read as a property.
STAGES = {
    "gram": (Inputs, "gram"),
    "damping": (felt, "best_damping"),
    "scales": (felt, "felt_scale"),
    "order": (Rounding, "__init__"),
    "root": (rounding, "upper_root"),
    "feedback": (Rounding, "feed_back"),
    "passes": (Rounding, "descend"),
    "errors": (felt.Felt, "objective"),
}
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


@contextlib.contextmanager
def stopwatches(device: torch.device):
    """Seconds of each of the STAGES, those of the root taken out of the feedback's."""
    spent = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, work: Callable) -> Callable:
        def run(*args: object) -> object:
            begin = now(device)
            try:
                return work(*args)
            finally:
                spent[stage] += now(device) - begin

        return run

    with contextlib.ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            work = vars(owner)[name]
            is_property = isinstance(work, property)
            watched = property(timed(stage, work.fget)) if is_property else timed(stage, work)
            setattr(owner, name, watched)
            stack.callback(setattr, owner, name, work)
        yield spent
    spent["feedback"] -= spent["root"]


@dataclass(frozen=True)
class Case:
    """A layer, what was seen of its inputs, and other rows of them."""

    kind: str
    weight: torch.Tensor
    inputs: Inputs
    others: torch.Tensor

    @classmethod
    def drawn(cls, kind: str, n: int, k: int, device: torch.device) -> Case:
        seen = k // 3
        rows = correlated_rows(k, seen + OTHERS, device=device, kind=kind)
        first, second = (half / len(half) ** 0.5 for half in rows[:seen].chunk(2))
        inputs = Inputs((first, second), (len(first), len(second)))
        return cls(kind, heavy_weight(n, k, device=device).bfloat16(), inputs, rows[seen:])

    def row(self, text: str, method: str, repeats: int) -> dict:
        """A format's seconds; the first run, which compiles kernels, apart."""
        wish, device = parse_wish(text), self.weight.device
        format, options = get_format(wish.format), wish.options
        weight, others = (format.prepare(part, options) for part in (self.weight, self.others))
        inputs = self.inputs.map(lambda rows: format.prepare(rows, options))
        grid = format.grid(LayerInput(tuple(self.weight.shape), "BF16"), options)
        nearest = self.error(grid.decode(*grid.nearest(weight)), weight, others)

        def run(method: str = method, **settings: object) -> Choice:
            chosen = get_method(method)
            generator = layer_generator(0, "layer", device)
            options = chosen.configure(settings)
            return choose(chosen, Layer(weight, grid, options, generator, inputs=inputs))

        def held_out(choice: Choice) -> float:
            return self.error(grid.decode(choice.codes, choice.scale), weight, others) / nearest

        first = seconds_of(run, device)
        with stopwatches(device) as spent:
            choice = run()
        seconds = [seconds_of(run, device) for _ in range(repeats)]
        return {
            "inputs": self.kind,
            "format": text,
            "method": method,
            "n": len(weight),
            "k": weight.shape[1],
            "rows": sum(self.inputs.counts),
            "seconds": statistics.median(seconds) if seconds else "",
            "first_s": first,
            "held_out": held_out(choice),
            "sketch": held_out(run("gptq", **SKETCH)),
            "nearest": nearest / float((others @ weight.float().T).norm()),
            "verdict": choice.verdict,
            **{f"{stage}_s": taken for stage, taken in spent.items()},
        }

    @staticmethod
    def error(decoded: torch.Tensor, weight: torch.Tensor, others: torch.Tensor) -> float:
        return float((others @ (decoded - weight.float()).T).norm())


def measure_layers(args: argparse.Namespace, device: torch.device) -> None:
    for kind in args.inputs:
        main_kind = kind == args.inputs[0]
        case = Case.drawn(kind, *args.size, device)
        for text in args.formats or (FORMATS if main_kind else OF_OTHER_KINDS):
            row = case.row(text, args.method, args.repeats if main_kind else 0)
            show_layer(row)
            append(RESULTS / "calibration_layer.csv", [row])


def show_layer(row: dict) -> None:
    seconds = f"{row['seconds']:.3f} s" if row["seconds"] else "       "
    print(
        f"{row['inputs']:<11}{row['format']:<29}{seconds} (first {row['first_s']:.1f}), output "
        f"error on other rows {row['held_out']:.3f} x nearest's {row['nearest']:.4f}, sketch "
        f"{row['sketch']:.3f} {row['verdict']}",
        flush=True,
    )
    print("    " + ", ".join(f"{stage} {row[f'{stage}_s']:.3f}" for stage in STAGES), flush=True)


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
    parser.add_argument("--inputs", nargs="+", default=list(KINDS), choices=tuple(KINDS))
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
