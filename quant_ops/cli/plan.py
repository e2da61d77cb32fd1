"""`fewbits plan IN --format F`: what would happen, from headers only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ..checkpoint.header import build_header
from ..checkpoint.importers.source import open_checkpoint
from ..doors.quantize import layers_to_round_again, with_warning
from ..pipeline import plan_source
from ..planning.recipe import Recipe
from ..planning.template import write_template
from ..report.report import layer_lines, megabytes, plan_lines
from ..spec import ModelPlan
from .common import recipe_from
from .door import say, warn


def run(args: argparse.Namespace) -> None:
    if args.template:
        say(str(write_template(args.input, overwrite=args.overwrite)))
    else:
        print_plan(args.input, recipe_from(args), as_json=args.json)


def print_warnings(plan: ModelPlan) -> None:
    """What the plan warns of, on stderr, wherever its text goes."""
    for warning in plan.warnings:
        warn(f"warning: {warning}")


def print_plan(
    path: Path,
    recipe: Recipe,
    *,
    as_json: bool,
    requantize: bool = False,
    facts: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Print the plan of one file: a row per layer, the rules that decided, totals, predicted file
    size; with further facts as JSON.
    """
    again = layers_to_round_again(path, recipe) if requantize else frozenset()
    with open_checkpoint(path, decoded=again) as source:
        plan = with_warning(plan_source(source, recipe), again)
    file_bytes = len(build_header(plan.outputs, plan.metadata)[0]) + plan.bytes_after
    print_warnings(plan)
    if as_json:
        print(json.dumps({**facts, **plan.to_json(), "file_bytes": file_bytes}, indent=2))
        return
    say(*layer_lines(plan), "", *plan_lines(plan))
    say(f"file size {megabytes(file_bytes)} ({file_bytes} bytes)")
