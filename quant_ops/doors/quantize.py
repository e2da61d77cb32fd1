"""quantize_file: a model file -> a quantized file, streamed layer by layer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ...kernels.memory import used_again
from ..calibration import Calibration
from ..checkpoint.importers import ImportOptions
from ..checkpoint.importers.source import ImportedSource, open_checkpoint
from ..checkpoint.open import open_file
from ..files import refuse_as_output
from ..pipeline import PlanFn, ProgressFn, ignore_progress, plan_run, plan_source, quantize
from ..planning.recipe import Recipe
from ..report.file import write_report
from ..report.report import Report
from ..spec import ModelPlan
from .problems import checked_sink, mendable


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    verify: bool = False,
    device: torch.device | str = "cpu",
    calibration: Calibration | None = None,
    input_scales: bool = False,
    requantize: bool = False,
    sidecar: bool = False,
    on_plan: PlanFn | None = None,
    on_progress: ProgressFn = ignore_progress,
) -> Report:
    """Convert a file, an index or a folder of shards to one safetensors file; streamed, atomic,
    input untouched.

    Layers in a foreign dialect are quantized already, and treated as such. The finished file is
    opened again and checked before it appears under its name.

    Args:
        input_scales: store the scale of each layer's inputs that the calibration knows, where the
            format takes one; inputs are then not scaled while running.
        requantize: layers that are quantized in another format than the recipe's are decoded and
            quantized again, which rounds them twice; the report names them. Without it they are
            refused.
        sidecar: write the report beside the file, as `<name>.fewbits.json`; where that fails the
            report says so in a warning.
        verify: before the file gets its name, decode every layer by the reference decoder too.

    Raises:
        QuantError: see `quantize` and `checked_sink`; and for a file that the reference decoder
            reads differently.
    """
    if calibration is not None:
        refuse_as_output(calibration.files, Path(target))
    with open_file(source) as file:
        known = mendable(file)
    sink = checked_sink(target, overwrite=overwrite, known=known, verify=verify)
    again = layers_to_round_again(source, recipe) if requantize else frozenset()
    for_gpu = torch.device(device).type == "cuda"

    def tell(plan: ModelPlan) -> None:
        if on_plan:
            on_plan(with_warning(plan, again))

    # the sink writes every tensor away
    with (
        used_again(),
        open_checkpoint(source, short_lived=True, for_gpu=for_gpu, decoded=again) as opened,
    ):
        report = quantize(
            opened,
            sink,
            recipe,
            device=device,
            calibration=calibration,
            input_scales=input_scales,
            on_plan=tell,
            on_progress=on_progress,
        )
    report = replace(
        report, plan=with_warning(report.plan, again), rounded_twice=tuple(sorted(again))
    )
    if sidecar:
        return with_sidecar(report, Path(target), opened.name)
    return report


def plan_file(
    source: str | os.PathLike,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    input_scales: bool = False,
    requantize: bool = False,
) -> ModelPlan:
    """What `quantize_file` would do, from headers, scales and samples of codes.

    Raises:
        QuantError: what `quantize_file` refuses before it reads a weight.
    """
    again = layers_to_round_again(source, recipe) if requantize else frozenset()
    with open_checkpoint(source, decoded=again) as opened:
        plan = plan_run(opened, recipe, calibration=calibration, input_scales=input_scales)
    return with_warning(plan, again)


def with_sidecar(report: Report, target: Path, source: str) -> Report:
    """The report, after it was written beside the file; with a warning where it was not."""
    _, problem = write_report(report, target, source)
    if not problem:
        return report
    plan = replace(report.plan, warnings=(*report.plan.warnings, problem))
    return replace(report, plan=plan)


def layers_to_round_again(source: str | os.PathLike, recipe: Recipe) -> frozenset[str]:
    """The quantized layers of a file that the recipe stores in another format, or in another
    geometry of the same.
    """
    clashes: set[str] = set()
    with open_file(source) as file, ImportedSource(file, ImportOptions()) as stored:
        made = dict(stored.canonical)
        copied = {base for base, layer in made.items() if layer.decode is not None}
        quantized = copied.union(base for base, layer in made.items() if layer.format)
        if not quantized:
            return frozenset()
        plan_source(stored, recipe, clashes)
    clashes |= copied
    with open_checkpoint(source, decoded=frozenset(quantized)) as opened:
        plan = plan_source(opened, recipe)
    return frozenset(
        layer.name for layer in plan.layers if layer.action == "quantize" and layer.name in clashes
    )


def with_warning(plan: ModelPlan, again: frozenset[str]) -> ModelPlan:
    """The plan, saying how many layers are rounded twice."""
    if not again:
        return plan
    warning = (
        f"{len(again)} layers were quantized already and are rounded a second time: they keep the "
        "error of the first format, which is unknown without the original, and gain that of the "
        "second, which is the one reported"
    )
    return replace(plan, warnings=(*plan.warnings, warning))
