"""`fewbits inspect FILE`: what is in it (the module is not called inspect, which is a standard
module).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..doors import inspect_file


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect", help="show family, layers per format, sizes and problems of a file"
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    inspection = inspect_file(args.file)
    print(json.dumps(inspection.to_json(), indent=2) if args.json else inspection.to_text())
