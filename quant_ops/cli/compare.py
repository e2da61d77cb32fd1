"""`fewbits compare A B`: how far the weights of one file are from another's, in any formats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..doors import compare_files
from .door import say
from .progress import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = ".safetensors file, .safetensors.index.json, or folder of shards"
    parser.add_argument("first", type=Path, help=f"{what}; errors are relative to it")
    parser.add_argument("second", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    with progress_bar(args.json) as show:
        found = compare_files(args.first, args.second, on_progress=show)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        say(found.to_text())
