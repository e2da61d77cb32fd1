"""`fewbits convert FILE -o OUT --to comfy_quant`: another dialect, the same codes; or a plain
model.
"""

from __future__ import annotations

import argparse
import json

from ..checkpoint.importers import ImportOptions
from ..checkpoint.reader import FileSource
from ..doors import convert_file
from .common import output_of
from .door import say
from .progress import progress_bar


def import_options(args: argparse.Namespace) -> ImportOptions:
    shapes, files = {}, ()
    if args.shapes_from:
        with FileSource(args.shapes_from) as original:
            shapes = {name: spec.shape for name, spec in original.header.tensors.items()}
            files = original.files
    return ImportOptions(
        assume=args.assume,
        assume_convrot=args.assume_convrot,
        nibble_order=args.nibble_order,
        shapes=shapes,
        files=files,
        full_precision_mm=getattr(args, "full_precision_mm", False),
    )


def run(args: argparse.Namespace) -> None:
    output = args.output or output_of(args.input, args.to)
    with progress_bar(args.quiet or args.json) as show:
        result = convert_file(
            args.input,
            output,
            to=args.to,
            options=import_options(args),
            only=args.only,
            hp_filter=args.hp_filter,
            overwrite=args.overwrite,
            verify=args.verify,
            on_progress=show,
        )
    if args.json:
        print(json.dumps({"output": str(output), **result.to_json()}, indent=2))
    elif not args.quiet:
        say(result.to_text())
        say(str(output))
