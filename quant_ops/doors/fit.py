"""fit: which layer gets which format, so that a file has a wanted size, or a wanted error."""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import torch

from ..calibration import Calibration
from ..calibration.effects import rounding
from ..checkpoint.header import build_header
from ..checkpoint.importers.source import open_checkpoint
from ..errors import RecipeError
from ..pipeline import Conditions, ProgressFn, ignore_progress, measured, plan_source
from ..planning.budget import Option, fewest_bytes, least_error, total_bytes, total_cost
from ..planning.calibrated import calibrated
from ..planning.goal import Goal
from ..planning.match import is_plain
from ..planning.recipe import Draft, Recipe, Rule, Wish, parse_wish
from ..report.layer import LayerResult, output_error
from ..report.report import megabytes
from ..sources import TensorSource
from ..spec import LayerPlan, ModelPlan

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

DEFAULTS = Path(__file__).parents[1] / "planning" / "fit.toml"
# Rows of a layer whose error is measured, in blocks of as many as the coarsest tiles are high: the
# error of 1,024 rows of Flux.1's layers is that of all to 1 %.
ROWS, BLOCK = 1024, 256
# The power of a layer's error that is summed. With a calibration the square is what reaches the
# prediction; without one nobody knows which layer is sensitive, and a mix that leaves none with a
# large error is the safer one. Emoji model, error of the prediction at 30, 40, 50 and 60 % with
# powers 2, 2.5 and 3: .270 .183 .0733 .0184, .263 .174 .0734 .0182, .249 .174 .0753 .0185.
POWER, POWER_OF_WEIGHTS = 2.0, 2.5
# Of the summed error of the best single format, with what that leaves over spent on its layers: a
# mix that does not promise less is not taken. Emoji model, 16 targets: promises up to .90 were
# kept, one of .97 was not.
CLEARLY = 0.95
ATTEMPTS = 6  # the header's length depends on the choice: solved again until the file fits
LISTED = 10

GoalOf = Callable[[int], Goal]  # the bytes of the source -> what to fit to


@dataclass(frozen=True)
class Way:
    """One way to store a layer: as a wish says, or as it is (None)."""

    wish: Wish | None
    bytes: int
    rel: float = 0.0  # error relative to the weight, or to the layer's outputs

    @property
    def label(self) -> str:
        if self.wish:
            return self.wish.to_text()
        return "keep"


@dataclass(frozen=True)
class Candidate:
    """A layer to choose for; its squared error counts `factor` times. Where the calibration
    measured effects these give it, and the sum is the squared error of the prediction.

    Elsewhere layers count alike, whatever their size: of the emoji model's,
    rounded one by one to 4 bits, each raises the denoiser's squared error by about what its own
    outputs have of it relatively (25 of 27 within 2.7 x), though their sizes differ 28 x.
    """

    name: str
    ways: tuple[Way, ...]
    factor: float = 1.0
    kept_by_preset: bool = False
    reach: float | None = None  # the factor that the layer's measured effect gives it

    @property
    def smallest(self) -> int:
        return min(way.bytes for way in self.ways)

    def index_of(self, wish: Wish | None) -> int:
        """The way that it takes where this is wished for all; 0, to keep it, where it has none."""
        return next((i for i, way in enumerate(self.ways) if way.wish == wish), 0)

    def row(self, chosen: Way) -> dict:
        """For JSON: what was chosen, and what there was to choose from."""
        return {
            "name": self.name,
            "chosen": chosen.label,
            "bytes": chosen.bytes,
            "error": chosen.rel,
            "factor": self.factor,
            "ways": {way.label: [way.bytes, way.rel] for way in self.ways},
        }

    def options(self, power: float = POWER) -> list[Option]:
        return [Option(way.bytes, self.factor * way.rel**power) for way in self.ways]


@dataclass(frozen=True)
class Fit:
    """The recipe that fits, its plan, the exact size of its file, and what was chosen of what.

    `error` is the root mean square over the layers that were chosen for, each counted as often as
    its factor says. `predicted` is the relative error of what the model predicts, root mean square
    over the steps at which effects were measured; None where none were.
    """

    goal: Goal
    recipe: Recipe
    plan: ModelPlan
    file_bytes: int
    error: float
    basis: str
    chosen: tuple[tuple[Candidate, Way], ...]
    predicted: float | None = None

    def to_json(self) -> dict:
        rows = [layer.row(way) for layer, way in self.chosen]
        goal = {"said": self.goal.said, "bytes": self.goal.bytes, "error": self.goal.error}
        return {
            **self.plan.to_json(),
            "file_bytes": self.file_bytes,
            "fit": {
                "goal": goal,
                "error": self.error,
                "predicted": self.predicted,
                "basis": self.basis,
                "layers": rows,
            },
        }

    def to_text(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """What was asked for, what came out, and which layers it cost."""
        room = ""
        if self.goal.bytes:
            room = f", {100 * (1 - self.file_bytes / self.goal.bytes):.1f} % below the limit"
        lines = [
            f"{self.goal.said}: {megabytes(self.file_bytes)} ({self.file_bytes} bytes){room}",
            f"error {self.error:.4f} ({self.basis})",
        ]
        if self.predicted is not None:
            lines.append(
                f"the model's prediction will err by about {self.predicted:.4f}, relative, over "
                "steps spread over sampling: less in the first, more in the last"
            )
        counts = Counter(way.label for _, way in self.chosen)
        lines += [f"  {count:>4} layers  {label}" for label, count in counts.most_common()]
        worst = sorted(self.chosen, key=lambda pair: -_part(*pair))
        total = sum(_part(*pair) for pair in self.chosen) or 1.0
        lines.append("layers with the largest parts of the error:")
        lines += [
            f"  {100 * _part(layer, way) / total:5.1f} %  {layer.name}  {way.label}"
            for layer, way in worst[:LISTED]
            if _part(layer, way)
        ]
        return lines


def _part(layer: Candidate, way: Way) -> float:
    return layer.factor * way.rel**2


def fit_file(
    source: str | os.PathLike,
    goal_of: GoalOf,
    draft: Draft = Draft(),  # noqa: B008  (frozen)
    *,
    allowed: Iterable[Wish] = (),
    calibration: Calibration | None = None,
    device: torch.device | str = "cpu",
    on_progress: ProgressFn = ignore_progress,
) -> Fit:
    """`fit` for a file, an index or a folder of shards."""
    with open_checkpoint(source) as opened:
        return fit(
            opened,
            goal_of,
            draft,
            allowed=allowed,
            calibration=calibration,
            device=device,
            on_progress=on_progress,
        )


def fit(
    source: TensorSource,
    goal_of: GoalOf,
    draft: Draft,
    *,
    allowed: Iterable[Wish] = (),
    calibration: Calibration | None = None,
    device: torch.device | str = "cpu",
    on_progress: ProgressFn = ignore_progress,
) -> Fit:
    """Choose a format for every layer that the draft's own rules leave open.

    Every layer is rounded in every allowed format, some rows of it, and the error is measured: of
    its outputs where the calibration knows its inputs, else of its weight. The sum of squares is
    then made as small as the goal allows, or the file as small as the error allows. Keeping a layer
    as it is is always allowed.

    Args:
        goal_of: from the bytes of the source to what to fit to.
        draft: the user's own rules, preset and seed; no primary wish.
        allowed: formats to choose among; none: those of `fit.toml`.

    Raises:
        RecipeError: nothing that is allowed fits; says the smallest that would. Or the source fits
            as it is.
        QuantError: see `plan_source`.
    """
    wishes = tuple(allowed) or default_wishes()
    own = _plan(source, draft, wishes[0], calibration)
    whole = own.bytes_before
    goal = goal_of(whole)
    if goal.bytes is not None and whole <= goal.bytes:
        raise RecipeError(
            f"{source.name}: fits as it is, its tensors take {whole:,} of {goal.bytes:,} bytes; "
            "use it unchanged, or ask for less"
        )
    plans = [_plan(source, replace(draft, preset="none"), wish, calibration) for wish in wishes]
    conditions = Conditions(torch.device(device), draft.seed or 0, calibration)
    layers = _candidates(source, own, wishes, plans, conditions=conditions, on_progress=on_progress)
    if not layers:
        raise RecipeError(f"{source.name}: there is no layer to choose a format for")
    return _settled(source, goal, draft, layers, calibration=calibration)


@cache
def default_wishes() -> tuple[Wish, ...]:
    """The formats to choose among where nobody says any."""
    table = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))
    return tuple(map(parse_wish, table["allowed"]))


def file_size(plan: ModelPlan) -> int:
    """Bytes of the file that a plan gives, header included."""
    return len(build_header(plan.outputs, plan.metadata)[0]) + plan.bytes_after


def _plan(
    source: TensorSource, draft: Draft, wish: Wish, calibration: Calibration | None
) -> ModelPlan:
    recipe = replace(draft, primary=wish).finish()
    return calibrated(plan_source(source, recipe), calibration, source.name)


def _candidates(
    source: TensorSource,
    own: ModelPlan,
    wishes: tuple[Wish, ...],
    plans: list[ModelPlan],
    conditions: Conditions,
    on_progress: ProgressFn,
) -> list[Candidate]:
    """Every layer that only the primary wish decides, with all ways to store it, measured."""
    by_name = list(map(_by_name, plans))
    open_layers = [layer for layer in own.layers if layer.action != "drop" and _is_open(layer)]
    chosen = []
    for layer in open_layers:
        planned = zip(wishes, (found[layer.name] for found in by_name), strict=True)
        ways = [(wish, way) for wish, way in planned if way.action == "quantize"]
        if ways and all(way.rule == "primary" for _, way in ways):
            chosen.append((layer, ways))
    total, done = sum(layer.bytes_before for layer, _ in chosen), 0
    candidates = []
    for layer, ways in chosen:
        on_progress(done, total, layer.name)
        weight = source.read(f"{layer.name}.weight")
        rows = _some_rows(weight)
        found = [Way(None, layer.bytes_before)]
        outputs = True
        for wish, way in ways:
            result = measured(source.name, way, rows, conditions)
            outputs = outputs and result.output is not None
            found.append(Way(wish, way.bytes_after, _error(result)))
            on_progress(done, total, layer.name)
        kept = layer.action == "keep"
        candidates.append(
            Candidate(
                name=layer.name,
                ways=tuple(found),
                reach=_reach(layer.name, tuple(weight.shape), rows, conditions)
                if outputs
                else None,
                kept_by_preset=kept,
            )
        )
        done += layer.bytes_before
    on_progress(total, total, "")
    return _with_effects(candidates)


def _reach(
    name: str, shape: tuple[int, int], rows: torch.Tensor, conditions: Conditions
) -> float | None:
    """By how much the squared error of the layer's outputs counts in the prediction's, both
    relative; None where the calibration measured no effect of the layer.
    """
    seen = conditions.calibration
    effect = seen and seen.effect_of(name)
    if not effect:
        return None
    wide = rows.to(conditions.device).float()
    known = seen.inputs_of(name, shape, conditions.device)
    error = output_error(wide, wide + rounding(wide), known, seen=False)
    if error and error.relative:
        return effect / error.relative**2
    return None


def _with_effects(layers: list[Candidate]) -> list[Candidate]:
    """Factors as effects say, their median for layers without; as they are where there are none."""
    known = [layer.reach for layer in layers if layer.reach]
    if not known:
        return layers
    other = statistics.median(known)
    return [replace(layer, factor=layer.reach or other) for layer in layers]


def _by_name(plan: ModelPlan) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan.layers}


def _is_open(layer: LayerPlan) -> bool:
    return layer.action == "quantize" or (layer.action == "keep" and layer.is_layer)


def _error(result: LayerResult) -> float:
    if result.output:
        return result.output.relative
    return result.rel_l2


def _some_rows(weight: torch.Tensor) -> torch.Tensor:
    """Blocks of rows spread evenly over a tall weight, the first and the last among them."""
    if len(weight) <= ROWS or len(weight) % BLOCK:
        return weight
    blocks = len(weight) // BLOCK
    count = ROWS // BLOCK
    picked = [round(i * (blocks - 1) / (count - 1)) for i in range(count)]
    return torch.cat([weight[BLOCK * at : BLOCK * (at + 1)] for at in picked])


def _settled(
    source: TensorSource,
    goal: Goal,
    draft: Draft,
    layers: list[Candidate],
    calibration: Calibration | None,
) -> Fit:
    """Solve, plan, and look at the exact size of the file: what the header takes depends on the
    choice, so it is solved again for the room that this leaves.
    """
    power = POWER if calibration else POWER_OF_WEIGHTS
    best, room, tried = None, goal.bytes, set()
    for _ in range(ATTEMPTS):
        if goal.bytes is None:
            found = _fewest_bytes(layers, goal.error)
        else:
            found = least_error_or_uniform(layers, room, power)
        if found is None:
            break
        ways = [layer.ways[i] for layer, i in zip(layers, found, strict=True)]
        attempt = _planned(source, goal, draft, layers, ways=ways, calibration=calibration)
        if goal.bytes is None:
            return attempt
        if attempt.file_bytes <= goal.bytes and (best is None or attempt.error < best.error):
            best = attempt
        tried.add(room)
        room = goal.bytes - (attempt.file_bytes - sum(way.bytes for way in ways))
        if room in tried:
            break
    if best is None:
        raise RecipeError(_too_little(source.name, goal, layers))
    return best


def _fewest_bytes(layers: list[Candidate], error: float) -> list[int] | None:
    options = list(map(Candidate.options, layers))
    return fewest_bytes(options, _counted(layers) * error**2)


def _counted(layers: Iterable[Candidate]) -> float:
    return math.fsum(layer.factor for layer in layers)


def _planned(
    source: TensorSource,
    goal: Goal,
    draft: Draft,
    layers: list[Candidate],
    ways: list[Way],
    *,
    calibration: Calibration | None,
) -> Fit:
    recipe = _recipe(draft, layers, ways)
    plan = calibrated(plan_source(source, recipe), calibration, source.name)
    chosen = tuple(zip(layers, ways, strict=True))
    summed = math.fsum(_part(*pair) for pair in chosen)
    return Fit(
        goal,
        recipe,
        plan,
        file_size(plan),
        error=math.sqrt(summed / _counted(layers)),
        basis=_basis(calibration),
        chosen=chosen,
        predicted=math.sqrt(summed) if any(layer.reach for layer in layers) else None,
    )


def least_error_or_uniform(
    layers: Sequence[Candidate], budget: int, power: float = POWER
) -> list[int] | None:
    """Which way of each layer: the least error within the budget, or, where that is not clearly
    less, the best single format that fits, with what it leaves over spent on its layers.

    Returns:
        An index per layer; None where even the smallest ways do not fit.
    """
    options = [layer.options(power) for layer in layers]
    mixed = least_error(options, budget)
    uniform = _better_uniform(layers, options, budget)
    if mixed is None or uniform is None:
        return mixed or uniform
    clearly = total_cost(options, mixed) <= CLEARLY * total_cost(options, uniform)
    if clearly:
        return mixed
    return uniform


def _better_uniform(
    layers: Sequence[Candidate], options: Sequence[Sequence[Option]], budget: int
) -> list[int] | None:
    """The best single format that fits, no layer worse than in it; None where none fits."""
    fitting = [chosen for chosen in _uniform(layers) if total_bytes(options, chosen) <= budget]
    if not fitting:
        return None
    start = min(fitting, key=lambda chosen: total_cost(options, chosen))
    better, narrowed = [], []
    for ways, at in zip(options, start, strict=True):
        kept = [i for i, way in enumerate(ways) if way.cost <= ways[at].cost]
        better.append(kept)
        narrowed.append([ways[i] for i in kept])
    found = least_error(narrowed, budget)
    return [kept[i] for kept, i in zip(better, found, strict=True)]


def _uniform(layers: Sequence[Candidate]) -> Iterator[list[int]]:
    """Every format for all layers, and for all but those that the model's preset would keep."""
    ways = chain(*(layer.ways for layer in layers))
    wishes = dict.fromkeys(way.wish for way in ways)
    for wish in wishes:
        everywhere = [layer.index_of(wish) for layer in layers]
        yield everywhere
        yield [
            0 if layer.kept_by_preset else at for layer, at in zip(layers, everywhere, strict=True)
        ]


def _basis(calibration: Calibration | None) -> str:
    if calibration is None:
        return "of weights; without a calibration nobody knows which layers matter most"
    outputs = "of the outputs of layers, for the inputs of the calibration"
    if calibration.effects:
        return f"{outputs}, by how far they reach the prediction"
    return outputs


def _recipe(draft: Draft, layers: list[Candidate], ways: list[Way]) -> Recipe:
    """The commonest wish as primary, and a rule for each layer that becomes something else."""
    sizes: Counter[Wish] = Counter()
    for layer, way in zip(layers, ways, strict=True):
        if way.wish and not layer.kept_by_preset:
            sizes[way.wish] += layer.ways[0].bytes
    wishes = [way.wish for way in layers[0].ways if way.wish]
    primary = max(sizes, key=sizes.get) if sizes else wishes[0]
    rules = []
    for layer, way in zip(layers, ways, strict=True):
        without = None if layer.kept_by_preset else primary
        if way.wish != without:
            rules.append(Rule(_exactly(layer.name), way.wish))
    return replace(draft, primary=primary, rules=(*draft.rules, *rules)).finish()


def _exactly(name: str) -> str:
    """A pattern that matches one layer."""
    if is_plain(name):
        return name
    return f"re:{re.escape(name)}"


def _too_little(file: str, goal: Goal, layers: list[Candidate]) -> str:
    smallest = sum(layer.smallest for layer in layers)
    whole = sum(layer.ways[0].bytes for layer in layers)
    if goal.bytes is None:
        return f"{file}: {goal.said} cannot be kept; allow a format with less error"
    return (
        f"{file}: {goal.said} cannot be reached: the {len(layers)} layers to choose for take at "
        f"least {megabytes(smallest)} of their {megabytes(whole)}; allow a smaller format"
    )
