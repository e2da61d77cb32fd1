"""Arguments that several commands share, and the recipe they build."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..errors import RecipeError
from ..formats import FORMATS, own_methods, short_names
from ..methods import METHODS
from ..planning.layer_config import load_layer_config
from ..planning.recipe import Draft, Recipe, Rule, Wish, draft_from_toml, parse_rule, parse_wish


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        metavar="F",
        help=f"what layers become: {', '.join(FORMATS)}; for short {', '.join(short_names())}",
    )
    parser.add_argument(
        "--scaling", help="how many weights share a scale: tensor, row (default: the format's own)"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="R.toml", help="a recipe file; --format only if it says none"
    )
    parser.add_argument(
        "--rule",
        dest="rules",
        action="append",
        default=[],
        type=_reported(parse_rule),
        metavar="PATTERN=FORMAT[:o=v,...]",
        help="another format for layers whose name matches (glob, re: or search:); first match "
        "decides; repeatable",
    )
    parser.add_argument(
        "--keep",
        dest="rules",
        action="append",
        type=_reported(lambda text: Rule(text, None)),
        metavar="PATTERN",
        help="keep matching layers as they are; repeatable, in one order with --rule",
    )
    parser.add_argument(
        "--fallback",
        type=_reported(parse_wish),
        metavar="F",
        help="format for what a preset would keep",
    )
    parser.add_argument(
        "--heur",
        dest="heuristics",
        action="store_true",
        help="layers that gain nothing by their shape count as excluded",
    )
    parser.add_argument(
        "--layer-config", type=Path, metavar="C.json", help="settings per layer, before every rule"
    )
    parser.add_argument(
        "--fullmatch", action="store_true", help="layer-config keys are whole regular expressions"
    )
    parser.add_argument(
        "--method", help=f"how codes are chosen: {', '.join(METHODS)} (default: {own_methods()})"
    )
    parser.add_argument("--preset", help="auto (default), none, or presets joined by +")
    parser.add_argument(
        "--seed", type=int, help="seed of methods that draw random numbers (default 0)"
    )


def _reported(parse: Callable) -> Callable:
    """argparse shows ArgumentTypeError texts; ours are RecipeErrors."""

    def convert(text: str) -> object:
        try:
            return parse(text)
        except RecipeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The Recipe that the arguments describe; --rule and --keep go before the rules of a recipe
    file.

    Raises:
        RecipeError: contradicting arguments, or a malformed recipe or layer-config.
    """
    base = draft_from_toml(args.recipe) if args.recipe else Draft()
    if base.primary and (args.format or args.scaling or args.method):
        raise RecipeError(
            "--recipe already says format, scaling and method; change the file or leave --recipe "
            "out"
        )
    if not base.primary and not args.format:
        raise RecipeError(
            f"say --format (one of {', '.join(FORMATS)}) or --recipe FILE with a [primary] table"
        )
    primary = base.primary or _primary(args)
    config = None
    if args.layer_config:
        if base.layer_config:
            raise RecipeError(
                "--layer-config: the recipe has a [layer_config] of its own; leave one of them out"
            )
        config = load_layer_config(args.layer_config, fullmatch=args.fullmatch)
    elif args.fullmatch:
        raise RecipeError("--fullmatch is about the keys of --layer-config FILE, which is missing")
    stated = Draft(
        None,
        tuple(args.rules),
        args.fallback,
        args.preset,
        seed=args.seed,
        layer_config=config,
        heuristics=args.heuristics,
    )
    return replace(stated.over(base), primary=primary).finish()


def _primary(args: argparse.Namespace) -> Wish:
    """--format, in which options may stand, with --scaling and --method."""
    separator = "," if ":" in args.format else ":"
    options = [
        f"{key}={value}"
        for key, value in (("scaling", args.scaling), ("method", args.method))
        if value
    ]
    return parse_wish(args.format + (separator + ",".join(options) if options else ""))
