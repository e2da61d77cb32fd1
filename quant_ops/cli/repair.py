"""`fewbits repair FILE -o OUT`: fix what can be fixed without the original, and say what was
done.
"""

from __future__ import annotations

import argparse
import json

from ..doors import repair_file
from .common import output_of
from .convert import import_options
from .door import say
from .progress import progress_bar


def run(args: argparse.Namespace) -> int:
    output = args.output or output_of(args.input, "repaired")
    with progress_bar(args.quiet or args.json) as show:
        done = repair_file(
            args.input,
            output,
            options=import_options(args),
            overwrite=args.overwrite,
            verify=args.verify,
            on_progress=show,
        )
    if args.json:
        print(json.dumps({"output": str(output), **done.to_json()}, indent=2))
    elif not args.quiet:
        say(done.to_text())
        say(str(output))
    return int(bool(done.left))
