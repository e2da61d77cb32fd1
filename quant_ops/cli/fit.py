"""The recipe that fits a file to a size or to an error, from the arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..calibration import Calibration
from ..doors.fit import Fit, GoalOf, fit_file
from ..errors import CheckpointError, RecipeError
from ..part import write_whole
from ..planning.goal import error_goal, memory_goal, size_goal
from ..planning.recipe import parse_wish, recipe_to_toml
from .common import draft_from
from .progress import progress_bar


def fitted(
    args: argparse.Namespace,
    *,
    device: torch.device | str = "cpu",
    calibration: Calibration | None = None,
    quiet: bool = False,
) -> Fit | None:
    """The fit that the arguments ask for; None where they ask for none.

    Raises:
        RecipeError: contradicting arguments, or nothing that is allowed fits.
    """
    goal = _goal(args)
    if goal is None:
        for name in ("allow", "save_recipe"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise RecipeError(f"--{flag} belongs to --target-size, --target-vram, --max-error")
        return None
    draft = draft_from(args)
    if draft.primary or args.format or args.scaling or args.method:
        raise RecipeError(
            "a fit chooses the format of every layer: leave out --format, --scaling, --method and "
            "a recipe's [primary]; --allow says what it may choose among"
        )
    with progress_bar(quiet) as show:
        found = fit_file(
            args.input,
            goal,
            draft,
            allowed=tuple(map(parse_wish, args.allow)),
            calibration=calibration,
            device=device,
            on_progress=show,
        )
    if args.save_recipe:
        _save(args.save_recipe, recipe_to_toml(found.recipe), overwrite=args.overwrite)
    return found


def _goal(args: argparse.Namespace) -> GoalOf | None:
    if args.target_size:
        return lambda whole: size_goal(args.target_size, whole)
    if args.target_vram:
        return lambda whole: memory_goal(args.target_vram, whole)
    if args.max_error:
        return lambda whole: error_goal(args.max_error)
    return None


def _save(path: Path, text: str, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"{path}: exists already; choose another name or allow overwriting", option="overwrite"
        )
    try:
        write_whole(path, text.encode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
