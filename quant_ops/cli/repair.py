"""`fewbits repair FILE -o OUT`: fix what can be fixed without the original, and say what was
done.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..doors import repair_file
from .convert import add_import_arguments, import_options
from .door import say
from .progress import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, help=".safetensors file, .safetensors.index.json, or folder of shards"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    add_import_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with progress_bar(args.quiet or args.json) as show:
        done = repair_file(
            args.input,
            args.output,
            options=import_options(args),
            overwrite=args.overwrite,
            on_progress=show,
        )
    if args.json:
        print(json.dumps({"output": str(args.output), **done.to_json()}, indent=2))
    elif not args.quiet:
        say(done.to_text())
        say(str(args.output))
    return 1 if done.left else 0
