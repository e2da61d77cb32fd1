"""`fewbits plan IN --format F`: what would happen, from headers only."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..checkpoint.header import build_header
from ..checkpoint.reader import FileSource
from ..pipeline import plan_source
from ..planning.recipe import Recipe
from ..report.report import megabytes, plan_lines
from .common import add_recipe_arguments, recipe_from


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("plan", help="show what would happen to every layer; reads headers only")
    parser.add_argument("input", type=Path, help=".safetensors file, .safetensors.index.json, or folder of shards")
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=lambda args: print_plan(args.input, recipe_from(args), as_json=args.json))


def print_plan(path: Path, recipe: Recipe, *, as_json: bool) -> None:
    """Print the plan of one file: a row per layer, totals, predicted file size."""
    with FileSource(path) as source:
        plan = plan_source(source, recipe)
    file_bytes = len(build_header(plan.outputs, plan.metadata)[0]) + plan.bytes_after
    if as_json:
        print(json.dumps({**plan.to_json(), "file_bytes": file_bytes}, indent=2))
        return
    for layer in plan.layers:
        if layer.is_layer:
            label = layer.format or layer.action
            print(f"{label:<24} {layer.method or '':<8} {megabytes(layer.bytes_after):>10}  {layer.name}  [{layer.reason}]")
    print()
    print("\n".join(plan_lines(plan)))
    print(f"file size {megabytes(file_bytes)} ({file_bytes} bytes)")
