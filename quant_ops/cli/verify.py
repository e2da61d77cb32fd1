"""`fewbits verify FILE [--against ORIGINAL]`: decode and check every layer; exit status 1 when
something is wrong.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..doors import verify_file
from .door import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, help=".safetensors file, .safetensors.index.json, or folder of shards"
    )
    parser.add_argument(
        "--against", type=Path, metavar="ORIGINAL", help="also the error of each layer, worst first"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = verify_file(args.file, args.against)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        say(found.to_text())
    return 0 if found.ok else 1
