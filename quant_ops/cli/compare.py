"""`fewbits compare A B`: how far the weights of one file are from another's, in any formats."""

from __future__ import annotations

import argparse
import json

from ..doors import compare_files
from .door import say
from .progress import progress_bar


def run(args: argparse.Namespace) -> None:
    with progress_bar(args.json) as show:
        found = compare_files(args.first, args.second, on_progress=show)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        say(found.to_text())
