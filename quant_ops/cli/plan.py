"""`fewbits plan IN --format F`: what would happen, from headers only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from types import MappingProxyType

from ..checkpoint.header import build_header
from ..checkpoint.importers.source import open_checkpoint
from ..doors.advise import advise_file
from ..errors import RecipeError
from ..pipeline import plan_source
from ..planning.advice import read_bench
from ..planning.template import write_template
from ..report.report import layer_lines, megabytes, plan_lines
from ..spec import ModelPlan
from .common import card_from, draft_from, recipe_from
from .door import say, warn


def run(args: argparse.Namespace) -> None:
    if args.template:
        say(str(write_template(args.input, overwrite=args.overwrite)))
    elif args.advise:
        _advise(args)
    elif args.bench:
        raise RecipeError("--bench is about --advise, which is missing")
    else:
        recipe = recipe_from(args)
        with open_checkpoint(args.input) as source:
            plan = plan_source(source, recipe)
        print_plan(plan, as_json=args.json)


def _advise(args: argparse.Namespace) -> None:
    """Print which formats suit the input.

    Raises:
        RecipeError: a format is stated too, or an unknown GPU.
    """
    draft = draft_from(args)
    if args.format or args.scaling or args.method or draft.primary:
        raise RecipeError("--advise chooses the format: leave out --format, --scaling, --method")
    found = advise_file(
        args.input,
        card_from(args),
        draft=draft,
        comfyui=args.comfyui,
        bench=args.bench and read_bench(args.bench),
    )
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        say(found.to_text())


def print_warnings(plan: ModelPlan) -> None:
    """What the plan warns of, on stderr, wherever its text goes."""
    for warning in plan.warnings:
        warn(f"warning: {warning}")


def print_plan(
    plan: ModelPlan, *, as_json: bool, facts: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Print a plan: a row per layer, the rules that decided, totals, predicted file size; with
    further facts as JSON.
    """
    file_bytes = len(build_header(plan.outputs, plan.metadata)[0]) + plan.bytes_after
    print_warnings(plan)
    if as_json:
        print(json.dumps({**facts, **plan.to_json(), "file_bytes": file_bytes}, indent=2))
        return
    say(*layer_lines(plan), "", *plan_lines(plan))
    say(f"file size {megabytes(file_bytes)} ({file_bytes} bytes)")
