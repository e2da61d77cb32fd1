"""`fewbits quantize IN -o OUT --format F`: stream a file to a quantized file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..calibration import load_calibration
from ..doors import quantize_file
from ..errors import RecipeError
from .common import add_recipe_arguments, recipe_from
from .door import say
from .plan import print_plan, print_warnings
from .progress import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input", type=Path, help=".safetensors file, .safetensors.index.json, or folder of shards"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.safetensors")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="C.safetensors",
        help="what the layers are given while the model runs, for method gptq (see calibrate)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda when there is one), cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--verify", action="store_true", help="decode what was written by a second decoder too"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="layers that are quantized in another format are decoded and rounded again",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and convert nothing")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    recipe = recipe_from(args)
    if args.dry_run:
        print_plan(args.input, recipe, as_json=args.json, requantize=args.requantize)
        return
    if args.output is None:
        raise RecipeError("-o OUT.safetensors is required")
    with progress_bar(args.quiet or args.json) as show:
        report = quantize_file(
            args.input,
            args.output,
            recipe,
            overwrite=args.overwrite,
            verify=args.verify,
            requantize=args.requantize,
            device=pick_device(args.device),
            calibration=load_calibration(args.calibration) if args.calibration else None,
            on_plan=None if args.quiet else print_warnings,
            on_progress=show,
        )
    if args.json:
        print(json.dumps({"output": str(args.output), **report.to_json()}, indent=2))
    elif not args.quiet:
        say(report.to_text())
        say(str(args.output))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when present, else CPU.

    Raises:
        RecipeError: not a device, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RecipeError(
                f"--device {name}: nothing is computed there; allowed: auto, cpu, cuda"
            )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
