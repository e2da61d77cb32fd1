"""What a fit is worth: the denoiser's error on held-out prompts, against every uniform format and two other ways to choose.

    python tests/benchmarks/fit.py [--parts uniform fits others] [--seen C.safetensors]

The emoji model; every file is written by `fewbits quantize` and read by the reference decoder. Calibrated on 32 prompts; the
error is that of what the model predicts, relative, for 10 other prompts at steps 1, 3 and 5 of 6 on the original's own way,
activations not rounded. Uniform: every format and its usual variants, with the family's preset and without. The others
choose per layer among the formats that the fit chooses among: `threshold`, the smallest format whose weight error is below one
number for all layers, the lowest number that fits (SDNQ's way); `gradient`, the least sum of squared products of the loss's
gradient and the error of each layer's outputs, on the calibration's prompts (ModelOpt's way), solved by the fit's own solver.
Writes the rows of its parts in results/fit.csv anew; `--seen` is where the calibration lies or is put. Asserts nothing; tests/test_fit_page.py does.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "import_shim"), str(HERE.parent)]

import torch

from fewbits.quant_ops.calibration import Calibration, Observer, save_calibration
from fewbits.quant_ops.calibration.effects import energy
from fewbits.quant_ops.checkpoint.importers.source import open_checkpoint
from fewbits.quant_ops.cli.__main__ import main as fewbits
from fewbits.quant_ops.doors import fit, quantize_file
from fewbits.quant_ops.formats import FORMATS, get_format
from fewbits.quant_ops.methods import Layer, choose, get_method, layer_generator
from fewbits.quant_ops.pipeline import Conditions, ignore_progress, plan_source
from fewbits.quant_ops.planning.budget import Option, least_error
from fewbits.quant_ops.planning.planner import _fitting
from fewbits.quant_ops.planning.recipe import Draft, Recipe, parse_wish
from fewbits.quant_ops.reference import decode_file
from fewbits.quant_ops.spec import LayerInput
from support.layers import EMOJI, emoji_trainer

RESULTS = HERE / "results" / "fit.csv"
WHOLE = EMOJI.stat().st_size
TARGETS = (30, 40, 50, 60)  # % of the bf16 file
SEEN, HELD = slice(0, 32), slice(32, 42)
STEPS, LOOKED_AT = 6, (1, 3, 5)
VARIANTS = (
    "int8_tensorwise:convrot=true", "int8_tensorwise:scaling=tensor", "int8_blockwise:block_size=64",
    "int8_lodewise:block_size=64", "int8_lodewise:block_size=32", "int8_lodewise:block_size=16", "float8_e4m3fn_blockwise:block_size=64",
    "bnb_nf4:method=mse_clip", "bnb_nf4:block_size=32,method=mse_clip", "bnb_nf4:block_size=256,method=mse_clip",
)  # fmt: skip


class Denoiser:
    """The emoji model's prediction where held-out prompts lead it, with any weights."""

    def __init__(self):
        self.train, self.model, prompts = emoji_trainer()
        self.prompts = [prompt for prompt in prompts if prompt]
        self.points = list(self._way(self.prompts[HELD]))
        with torch.no_grad():
            self.truth = [self.model(*point) for point in self.points]

    def _way(self, prompts: list[str]) -> Iterator[tuple[torch.Tensor, ...]]:
        """(x, t, context, pooled) at the steps that are looked at."""
        context, pooled = self.train.conditioning(prompts, "cpu")
        x = torch.randn(len(prompts), 16, 16, 16, generator=torch.Generator().manual_seed(7))
        times = torch.linspace(1, 0, STEPS + 1)
        for step in range(STEPS):
            t = torch.full((len(x),), float(times[step]))
            if step in LOOKED_AT:
                yield x, t, context, pooled
            with torch.no_grad():
                x = x + (times[step + 1] - times[step]) * self.model(x, t, context, pooled)

    def error(self, file: Path) -> float:
        """||prediction - the original's|| / ||the original's||, over all points."""
        original = {}
        for name, decoded in decode_file(file).items():
            module = self.model.get_submodule(name)
            original[name] = module.weight.data
            module.weight.data = torch.from_numpy(decoded).to(module.weight.dtype)
        with torch.no_grad():
            found = [self.model(*point) for point in self.points]
        for name, weight in original.items():
            self.model.get_submodule(name).weight.data = weight
        noise = sum(float((a - b).square().sum()) for a, b in zip(found, self.truth, strict=True))
        signal = sum(float(b.square().sum()) for b in self.truth)
        return (noise / signal) ** 0.5


class Bench:
    """Files in all ways, each a row of the results."""

    def __init__(self, folder: Path, seen: Path | None):
        self.denoiser, self.folder = Denoiser(), folder
        self.out, self.seen = folder / "out.safetensors", seen or folder / "seen.safetensors"

    def row(self, way: str, target: int | str = "", label: str = "") -> dict:
        size = self.out.stat().st_size
        found = {"way": way, "target": str(target), "label": label, "bytes": size}
        found |= {
            "share": f"{100 * size / WHOLE:.3f}",
            "error": f"{self.denoiser.error(self.out):.5f}",
        }
        print(found, flush=True)
        return found

    def uniform(self) -> Iterator[dict]:
        for text in (*FORMATS, *VARIANTS):
            for preset in ("auto", "none"):
                recipe = Recipe(parse_wish(text), preset=preset)
                quantize_file(EMOJI, self.out, recipe, overwrite=True)
                yield self.row("uniform", label=f"{text}, preset {preset}")

    def fits(self) -> Iterator[dict]:
        if not self.seen.exists():
            prompts = self.denoiser.prompts[SEEN]
            save_calibration(watched(self.denoiser, prompts), self.seen)
        for target in TARGETS:
            for way, more in (("fit", ()), ("calibrated fit", ("--calibration", str(self.seen)))):
                words = ["quantize", str(EMOJI), "-o", str(self.out), "--overwrite", "--quiet"]
                assert fewbits([*words, "--target-size", f"{target}%", *more]) == 0
                yield self.row(way, target)

    def others(self) -> Iterator[dict]:
        candidates = options_of_layers()
        scores = gradient_scores(self.denoiser, candidates)
        for target in TARGETS:
            for way, chosen in others(candidates, scores, int(target / 100 * WHOLE)):
                quantize_file(EMOJI, self.out, chosen, overwrite=True)
                yield self.row(way, target)


def watched(denoiser: Denoiser, prompts: list[str]) -> Calibration:
    """As the Calibrate node watches it, with effects: runs of 4 prompts, 16 steps, cfg 3."""
    model, observer = denoiser.model, Observer(10**9, effects=len(prompts))
    observer.start_run()  # the first is dealt out call by call, and here runs are to be halves

    @torch.no_grad()
    def predicted(*point: torch.Tensor) -> torch.Tensor:
        with observer.watching(model):
            result = model(*point)
        has_prompt = bool(point[2].any())
        if has_prompt and observer.effects.is_due():
            observer.measure(model, lambda: model(*point), result, energy(result))
        return result

    for start in range(0, len(prompts), 4):
        observer.start_run(16)
        given = denoiser.train.conditioning(prompts[start : start + 4], "cpu")
        denoiser.train.sample(predicted, *given, 16, 3.0, 1 + start, "cpu")
    return observer.finish()


PARTS = {
    "uniform": {"uniform"},
    "fits": {"fit", "calibrated fit"},
    "others": {"threshold", "gradient"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seen", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.seen)
        for part in args.parts:
            rows = []
            for row in getattr(bench, part)():
                rows.append(row)
                record(PARTS[part], rows)


def record(ways: set[str], rows: list[dict]) -> None:
    """These rows in place of those of the same ways."""
    kept = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["way"] not in ways]
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def options_of_layers() -> list[fit.Candidate]:
    """Every layer with all formats that a fit chooses among, and their weight errors."""
    draft, wishes = Draft(), fit.default_wishes()
    with open_checkpoint(EMOJI) as source:
        plans = [
            fit._plan(source, replace(draft, preset="none"), wish, calibration=None)
            for wish in wishes
        ]
        own = fit._plan(source, draft, wishes[0], None)
        return fit._candidates(
            source, own, wishes, plans, conditions=Conditions(), on_progress=ignore_progress
        )


def others(
    layers: list[fit.Candidate], scores: list[list[float]], budget: int
) -> Iterator[tuple[str, Recipe]]:
    """The recipes of the two other ways whose files are within the budget."""
    thresholds = sorted({way.rel for layer in layers for way in layer.ways})
    yield (
        "threshold",
        next(
            recipe
            for recipe, size in (recipe_of(layers, below(layers, limit)) for limit in thresholds)
            if size <= budget
        ),
    )
    pairs = [
        [Option(way.bytes, score) for way, score in zip(layer.ways, row, strict=True)]
        for layer, row in zip(layers, scores, strict=True)
    ]
    room = budget
    while True:
        found = least_error(pairs, room)
        ways = [layer.ways[i] for layer, i in zip(layers, found, strict=True)]
        recipe, size = recipe_of(layers, ways)
        if size <= budget:
            yield "gradient", recipe
            return
        room -= size - budget


def below(layers: list[fit.Candidate], limit: float) -> list[fit.Way]:
    return [
        min((way for way in layer.ways if way.rel <= limit), key=lambda way: way.bytes)
        for layer in layers
    ]


def recipe_of(layers: list[fit.Candidate], ways: list[fit.Way]) -> tuple[Recipe, int]:
    recipe = fit._recipe(Draft(), layers, ways)
    with open_checkpoint(EMOJI) as source:
        return recipe, fit.file_size(plan_source(source, recipe))


def gradient_scores(denoiser: Denoiser, layers: list[fit.Candidate]) -> list[list[float]]:
    """Per layer and way the sum over all outputs of (gradient of the loss x their error)^2.

    The loss is the one that trained the model, on the pictures that it draws for the seen prompts.
    """
    train, model = denoiser.train, denoiser.model
    context, pooled = train.conditioning(denoiser.prompts[SEEN], "cpu")
    pictures = train.sample(model, context, pooled, 16, 3.0, 1, "cpu")
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(pictures.shape, generator=generator)
    t = torch.rand(len(pictures), generator=generator)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [_record(model.get_submodule(layer.name), layer.name, seen) for layer in layers]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    mixed = (1 - t.view(-1, 1, 1, 1)) * pictures + t.view(-1, 1, 1, 1) * noise
    loss = (model(mixed, t, context, pooled) - (noise - pictures)).square().mean()
    loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return [_scores(layer, model.get_submodule(layer.name), *seen[layer.name]) for layer in layers]


def _record(module: torch.nn.Module, name: str, seen: dict) -> object:
    def hook(module, inputs, output):
        x = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda grad: seen.__setitem__(name, (x, grad.flatten(0, -2))))

    return module.register_forward_hook(hook)


def _scores(
    layer: fit.Candidate, module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor
) -> list[float]:
    scores = []
    for way in layer.ways:
        if way.wish is None:
            scores.append(0.0)
            continue
        error = decoded(layer.name, module.weight.data, way) - module.weight.data.float()
        scores.append(float(((x.float() @ error.T) * grad.float()).square().sum()))
    return scores


def decoded(name: str, weight: torch.Tensor, way: fit.Way) -> torch.Tensor:
    """(N, K) float32: what the way stores of a weight, in another format where it does not fit."""
    shape = LayerInput(tuple(weight.shape), "BF16")
    wish, _ = _fitting(name, shape, way.wish)
    format, method = get_format(wish.format), get_method(wish.method)
    options = wish.options
    prepared = format.prepare(weight.bfloat16(), options)
    grid = format.grid(shape, options)
    given = Layer(prepared, grid, method.configure({}), layer_generator(0, name, weight.device))
    choice = choose(method, given)
    packed = format.pack(choice.codes, choice.scale, options)
    return format.dequantize(packed, shape, options)


if __name__ == "__main__":
    main()
