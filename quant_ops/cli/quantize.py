"""`fewbits quantize IN -o OUT --format F`: stream a file to a quantized file."""

from __future__ import annotations

import argparse
import json

import torch

from ..calibration import load_calibration
from ..doors import quantize_file
from ..doors.quantize import plan_file
from ..errors import RecipeError
from ..options import stated
from .common import output_of, recipe_from
from .door import say
from .fit import fitted
from .plan import print_plan, print_warnings
from .progress import progress_bar


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    calibration = args.calibration and load_calibration(args.calibration)
    quiet = args.quiet or args.json
    fit = fitted(args, device=device, calibration=calibration, quiet=quiet)
    if fit and not quiet:
        say(*fit.lines(), "")
    facts: dict = {}
    if fit:
        recipe, facts = fit.recipe, fit.to_json()
    else:
        recipe = recipe_from(args)
    if args.dry_run:
        plan = plan_file(
            args.input,
            recipe,
            calibration=calibration,
            input_scales=args.input_scales,
            requantize=args.requantize,
        )
        print_plan(plan, as_json=args.json, facts=facts)
        return
    output = args.output or output_of(args.input, recipe.mark)
    with progress_bar(quiet) as show:
        report = quantize_file(
            args.input,
            output,
            recipe,
            overwrite=args.overwrite,
            verify=args.verify,
            requantize=args.requantize,
            device=device,
            calibration=calibration,
            input_scales=args.input_scales,
            sidecar=not args.no_report,
            on_plan=None if args.quiet else print_warnings,
            on_progress=show,
        )
    if args.json:
        found = {"output": str(output), **report.to_json(), **stated(fit=facts.get("fit"))}
        print(json.dumps(found, indent=2))
    elif not args.quiet:
        say(report.to_text())
        say(str(output))


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
