"""`fewbits convert FILE -o OUT --to comfy_quant`: another dialect, the same codes; or a plain
model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..checkpoint.exporters import TARGETS
from ..checkpoint.importers import ImportOptions
from ..checkpoint.reader import FileSource
from ..doors import convert_file
from .door import say
from .progress import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, help=".safetensors file, .safetensors.index.json, or folder of shards"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument(
        "--to", choices=TARGETS, default="comfy_quant",
        help="comfy_quant (ComfyUI's and ours), bnb (bitsandbytes' keys), bf16 (decoded)",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="only", choices=["fp8_scaled"], help="refuse any other dialect"
    )
    parser.add_argument(
        "--hp-filter",
        metavar="REGEX",
        help="every layer whose name matches must be high precision, else nothing is written",
    )
    parser.add_argument(
        "--full-precision-mm",
        action="store_true",
        help="mark FP8 layers for full-precision products",
    )
    add_import_arguments(parser)
    parser.add_argument(
        "--verify", action="store_true", help="decode what was written by a second decoder too"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """What a file may leave unsaid."""
    parser.add_argument(
        "--assume",
        metavar="F",
        help="what 4-bit layers are that do not say it: nf4, fp4, or a format with block scales",
    )
    parser.add_argument(
        "--assume-convrot",
        type=int,
        metavar="G",
        help="INT8 layers without JSON are rotated in groups of G",
    )
    parser.add_argument(
        "--nibble-order", choices=["low", "high"], help="for 4-bit layers where no rule decides"
    )
    parser.add_argument(
        "--shapes-from",
        type=Path,
        metavar="ORIGINAL",
        help="file that says the shapes of flat weights",
    )


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
    with progress_bar(args.quiet or args.json) as show:
        result = convert_file(
            args.input,
            args.output,
            to=args.to,
            options=import_options(args),
            only=args.only,
            hp_filter=args.hp_filter,
            overwrite=args.overwrite,
            verify=args.verify,
            on_progress=show,
        )
    if args.json:
        print(json.dumps({"output": str(args.output), **result.to_json()}, indent=2))
    elif not args.quiet:
        say(result.to_text())
        say(str(args.output))
