"""`fewbits inspect FILE`: what is in it (the module is not called inspect, which is a standard
module).
"""

from __future__ import annotations

import argparse
import json

from ..doors import inspect_file
from .door import say


def run(args: argparse.Namespace) -> None:
    inspection = inspect_file(args.file)
    if args.json:
        print(json.dumps(inspection.to_json(), indent=2))
    else:
        say(inspection.to_text())
