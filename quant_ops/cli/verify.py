"""`fewbits verify FILE [--against ORIGINAL]`: decode and check every layer; exit status 1 when
something is wrong.
"""

from __future__ import annotations

import argparse
import json

from ..doors import verify_file
from .door import say


def run(args: argparse.Namespace) -> int:
    found = verify_file(args.file, args.against)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        say(found.to_text())
    return int(not found.ok)
