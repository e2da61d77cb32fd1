"""Arguments that several commands share, and the recipe they build."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..checkpoint.importers.source import open_checkpoint
from ..doors.advise import chosen_wish
from ..errors import RecipeError
from ..formats import FORMATS
from ..planning.gpus import Card, card_here, find_card
from ..planning.layer_config import load_layer_config
from ..planning.recipe import Draft, Recipe, Rule, Wish, draft_from_toml, parse_rule, parse_wish

AUTO = "auto"  # as a format: what suits model and GPU best


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The Recipe that the arguments describe; --rule and --keep go before the rules of a recipe
    file.

    Raises:
        RecipeError: contradicting arguments, or a malformed recipe or layer-config.
    """
    draft = draft_from(args)
    if draft.primary and (args.format or args.scaling or args.method):
        raise RecipeError(
            "--recipe already says format, scaling and method; change the file or leave --recipe "
            "out"
        )
    if not draft.primary and not args.format:
        raise RecipeError(
            f"say --format (one of {', '.join(FORMATS)}) or --recipe FILE with a [primary] table"
        )
    return replace(draft, primary=draft.primary or _primary(args, draft)).finish()


def card_from(args: argparse.Namespace) -> Card | None:
    """The GPU that is named, or the one here; None without either.

    Raises:
        RecipeError: no such GPU.
    """
    if args.gpu:
        return find_card(args.gpu)
    return card_here()


def draft_from(args: argparse.Namespace) -> Draft:
    """What the arguments say beside the primary wish, over what a recipe file says.

    Raises:
        RecipeError: contradicting arguments, or a malformed recipe or layer-config.
    """
    if (args.gpu or args.comfyui) and args.format != AUTO and not getattr(args, "advise", False):
        raise RecipeError("--gpu and --comfyui are about --format auto and plan --advise")
    base = Draft()
    if args.recipe:
        base = draft_from_toml(args.recipe)
    config = None
    if args.layer_config:
        if base.layer_config:
            raise RecipeError(
                "--layer-config: the recipe has a [layer_config] of its own; leave one of them out"
            )
        config = load_layer_config(args.layer_config, fullmatch=args.fullmatch)
    elif args.fullmatch:
        raise RecipeError("--fullmatch is about the keys of --layer-config FILE, which is missing")
    fallback = None
    if args.fallback:
        fallback = parse_wish(args.fallback)
    stated = Draft(
        None,
        tuple(_rule(flag, text) for flag, text in args.rules),
        fallback,
        args.preset,
        seed=args.seed,
        layer_config=config,
        heuristics=args.heuristics,
    )
    return stated.over(base)


def _rule(flag: str, text: str) -> Rule:
    """--rule PATTERN=FORMAT or --keep PATTERN.

    Raises:
        RecipeError: a malformed rule, saying which.
    """
    try:
        if flag == "--keep":
            return Rule(text, None)
        return parse_rule(text)
    except RecipeError as error:
        raise RecipeError(f"argument {flag}: {error}") from None


def output_of(source: Path, mark: str) -> Path:
    """Where a result goes that nobody named: beside the input, `flux.safetensors` -> `flux_nf4`."""
    name = source.name
    for suffix in (".safetensors.index.json", ".safetensors", ".sft", ".gguf"):
        name = name.removesuffix(suffix)
    return source.with_name(f"{name or 'model'}_{mark}.safetensors")


def _primary(args: argparse.Namespace, draft: Draft) -> Wish:
    """--format, in which options may stand, with --scaling and --method."""
    if args.format == AUTO:
        return _chosen(args, draft)
    text = args.format
    for key, value in (("scaling", args.scaling), ("method", args.method)):
        if value:
            text += f"{_between(text)}{key}={value}"
    return parse_wish(text)


def _between(text: str) -> str:
    """What stands before one more option of a wish."""
    if ":" in text:
        return ","
    return ":"


def _chosen(args: argparse.Namespace, draft: Draft) -> Wish:
    """What --format auto stands for with this input, with --method."""
    if args.scaling:
        raise RecipeError("--format auto chooses the scales too: leave --scaling out")
    with open_checkpoint(args.input) as source:
        wish = chosen_wish(source, card_from(args), draft, args.comfyui)
    if args.method:
        return replace(wish, method=args.method, method_options=())
    return wish
