"""Stated flags -> the recipe they describe, and the equal `fewbits` command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import RecipeError, closest, did_you_mean
from ..formats import get_format
from ..planning.layer_config import load_layer_config
from ..planning.match import SEARCH, Regex, shortened
from ..planning.model_family import load_preset
from ..planning.recipe import Recipe, Rule
from ..planning.wish import Wish
from .flags import BY_NAME, PRIORITY, SIZED, TARGETS, Flag, underscored

Stated = dict[str, dict[str, object]]  # group -> field -> value
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Job:
    """One classic run. `arguments` are those of the equal `fewbits` command; `recipe` is None where
    none is needed.
    """

    kind: str  # "quantize" | "analyze" | "create-template" | "convert"
    input: Path
    output: Path | None
    recipe: Recipe | None
    arguments: tuple[str, ...]
    options: dict[str, object]
    notes: tuple[str, ...] = ()


def state(flags: dict[str, object]) -> Stated:
    """Flag values by name (either spelling) -> the same by group and field; False and None count as
    not stated.

    Raises:
        RecipeError: an unknown flag or value, with the closest one.
    """
    stated: Stated = {}
    for name, value in flags.items():
        flag = BY_NAME.get(underscored(name))
        if flag is None:
            guess = closest(underscored(name), BY_NAME)
            hint = f", did you mean --{BY_NAME[guess].name}?" if guess else ""
            raise RecipeError(f"unknown flag --{name}{hint}")
        if value is None or value is False:
            continue
        group, _, key = flag.field.partition(".")
        fields = stated.setdefault(group, {})
        read = _read(flag, value)
        adds_up = flag.value is bool and flag.means is not True
        if adds_up:
            read = (*fields.get(key, ()), read)
        fields[key] = read
    return stated


def _read(flag: Flag, value: object) -> object:
    """The value of one flag, checked."""
    if flag.value is bool:
        if value is not True:
            raise RecipeError(f"--{flag.name} is a switch and takes no value, got {value!r}")
        return flag.means
    if flag.value is Path:
        return Path(os.fspath(value))
    if isinstance(flag.value, tuple):
        if value not in flag.value:
            guess = did_you_mean(value, flag.value, otherwise="")
            raise RecipeError(
                f"--{flag.name} must be one of {', '.join(flag.value)}; got {value!r}{guess}"
            )
        return value
    try:
        number = flag.value(value)
    except (TypeError, ValueError):
        raise RecipeError(f"--{flag.name} must be {flag.value.__name__}, got {value!r}") from None
    if flag.value is int and isinstance(value, float) and number != value:
        raise RecipeError(f"--{flag.name} must be int, got {value!r}")
    return number


def make_job(flags: dict[str, object]) -> Job:
    """Everything a classic command says, checked before any file is read (the layer-config
    excepted).

    Raises:
        RecipeError: unknown or contradicting flags, or a malformed layer-config.
    """
    stated = state(flags)
    run = stated.get("run", {})
    if "input" not in run:
        raise RecipeError("-i/--input MODEL.safetensors is required")
    _refuse_contradictions(stated)
    if "fp8_scaled" in stated.get("convert", {}):
        return _conversion(stated, run)
    if run.get("dry_run") == "create-template":
        arguments = ["plan", str(run["input"]), "--template", *_switches(run, "overwrite")]
        return Job(
            "create-template", run["input"], None, None, arguments=tuple(arguments), options=run
        )
    recipe, wishes = _recipe(stated)
    notes = [*_priority_note(stated), *_input_scale_note(stated, wishes)]
    arguments = _recipe_arguments(stated, recipe)
    if run.get("dry_run"):
        command = ["plan", str(run["input"]), *arguments, *_switches(run, "json")]
        return Job(
            "analyze",
            run["input"],
            None,
            recipe,
            arguments=tuple(command),
            options=run,
            notes=tuple(notes),
        )
    output = run.get("output") or _automatic_name(run["input"], wishes)
    device = _option("--device", run.get("device"))
    switches = _switches(run, "overwrite", "quiet", "json")
    command = ["quantize", str(run["input"]), "-o", str(output), *arguments, *device, *switches]
    return Job(
        "quantize",
        run["input"],
        output,
        recipe,
        arguments=tuple(command),
        options=run,
        notes=tuple(notes),
    )


def _conversion(stated: Stated, run: dict[str, object]) -> Job:
    """`--convert-fp8-scaled` is `fewbits convert --from fp8_scaled`."""
    options = {
        **run,
        "hp_filter": stated["convert"].get("hp_filter"),
        "precise": "precise" in stated.get("primary", {}),
    }
    output = run.get("output") or _beside(run["input"], "comfy_quant")
    pattern = _option("--hp-filter", options["hp_filter"])
    precise = []
    if options["precise"]:
        precise = ["--full-precision-mm"]
    switches = _switches(run, "overwrite", "quiet", "json")
    command = [
        "convert",
        str(run["input"]),
        "-o",
        str(output),
        "--from",
        "fp8_scaled",
        *pattern,
        *precise,
        *switches,
    ]
    return Job("convert", run["input"], output, None, arguments=tuple(command), options=options)


NEEDS = {  # group.field -> what else must be stated for it to mean anything
    "custom.layers": "custom.type",
    "custom.type": "custom.layers",
    "custom.block_size": "custom.type",
    "custom.scaling": "custom.type",
    "custom.simple": "custom.type",
    "custom.heuristics": "custom.type",
    "fallback.block_size": "fallback.type",
    "fallback.simple": "fallback.type",
    "recipe.fullmatch": "recipe.layer_config",
    "convert.hp_filter": "convert.fp8_scaled",
}


def _refuse_contradictions(stated: Stated) -> None:
    named: set[str] = set()
    for group, fields in stated.items():
        named.update(f"{group}.{key}" for key in fields)
    for key, need in NEEDS.items():
        if key in named and need not in named:
            raise RecipeError(f"{_flag_of(key)} has no effect without {_flag_of(need)}")
    if "refused.legacy" in named:
        raise RecipeError(
            "--legacy: legacy scaled_fp8 files are read, never written; leave it out for "
            "comfy_quant"
        )
    if {"recipe.preset", "recipe.presets"} <= named:
        raise RecipeError("--preset and a preset's own flag say the same thing; use one of them")
    if "convert.fp8_scaled" in named:
        allowed = {"convert", "run", "accepted", "refused"}
        beside = sorted(named - {"primary.precise"})
        others = [key for key in beside if key.partition(".")[0] not in allowed]
        others += named & {"run.dry_run"}
        if others:
            flag = _flag_of(others[0])
            raise RecipeError(
                f"--convert-fp8-scaled copies codes as they are; {flag} does not apply"
            )
    if "primary.simple" in named and "svd" in stated:
        option = _flag_of(f"svd.{next(iter(stated['svd']))}")
        raise RecipeError(
            f"{option} is an option of learned rounding, which --simple switches off; leave one of "
            "them out"
        )


def _flag_of(key: str) -> str:
    return next(f"--{flag.name}" for flag in BY_NAME.values() if flag.field == key)


def _recipe(stated: Stated) -> tuple[Recipe, list[Wish]]:
    """The recipe, and every wish in it, the primary first."""
    recipe = stated.get("recipe", {})
    primary = _wish(stated, "primary")
    tiers = {tier: _wish(stated, tier) for tier in ("custom", "fallback") if tier in stated}
    rules = []
    if "custom" in tiers:
        pattern = _search("--custom-layers", stated["custom"]["layers"])
        rules.append(Rule(pattern, tiers["custom"], "heuristics" in stated["custom"]))
    if "exclude" in recipe:
        rules.append(Rule(_search("--exclude-layers", recipe["exclude"]), None))
    config, entries = None, ()
    if "layer_config" in recipe:
        config = load_layer_config(
            recipe["layer_config"], fullmatch="fullmatch" in recipe, unstated=primary
        )
        entries = (*config.entries, config.default)
    preset = "+".join(recipe.get("presets", ())) or recipe.get("preset", "auto")
    if preset != "auto":
        load_preset(preset)
    made = Recipe(
        primary=primary,
        rules=tuple(rules),
        fallback=tiers.get("fallback"),
        preset=preset,
        seed=max(recipe.get("seed", 0), 0),
        layer_config=config,
        heuristics="heuristics" in recipe,
    )
    configured = [entry.wish for entry in entries if entry and entry.wish]
    return made, [primary, *tiers.values(), *configured]


def _wish(stated: Stated, tier: str) -> Wish:
    shared = stated.get("primary", {})
    fields = stated.get(tier, {})
    simple = "simple" in fields or "simple" in shared
    learned = {} if simple else stated.get("svd", {})
    return wish_of(fields, tier=tier, simple=simple, precise="precise" in shared, svd=learned)


def wish_of(
    fields: dict[str, object],
    *,
    tier: str = "primary",
    simple: bool,
    precise: bool = False,
    svd: dict[str, object],
) -> Wish:
    """The wish of one tier: its type, scaling, backend and block size looked up in TARGETS; method
    svd unless simple.

    Raises:
        RecipeError: a combination that does not exist, or an option the format or the method does
            not have.
    """
    kind = fields.get("type") or "fp8"
    if isinstance(kind, tuple):
        kind = next(name for name in PRIORITY if name in kind)
    if kind not in PRIORITY:
        raise RecipeError(f"unknown format type {kind!r}{did_you_mean(str(kind), PRIORITY)}")
    sized = {"block_size": fields["block_size"]} if fields.get("block_size") is not None else {}
    scaling = fields.get("scaling") or (SIZED if sized else None)
    target = TARGETS.get((kind, scaling, fields.get("backend")))
    if target is None or not sized.keys() <= set(get_format(target.format).Options.names()):
        raise RecipeError(_contradiction(tier, kind, fields))
    options = {**target.options, **sized}
    if "convrot_groupsize" in fields:
        if "convrot" not in target.options:
            raise RecipeError("--convrot-group-size has no effect without --convrot")
        options["convrot_groupsize"] = fields["convrot_groupsize"]
    if simple and svd:
        raise RecipeError(
            f"{next(iter(svd))} is an option of learned rounding, which is switched off"
        )
    options["full_precision_matrix_mult"] = precise
    return Wish(target.format, options, "nearest" if simple else "svd", tuple(svd.items()))


def _contradiction(tier: str, kind: str, fields: dict[str, object]) -> str:
    """Which flags of a tier do not go together, and which combinations of this type do."""
    keys = [key for key in ("scaling", "backend", "block_size") if fields.get(key) is not None]
    said = [f"{_flag_of(f'{tier}.{key}')} {fields[key]}" for key in keys]
    known = {(scaling, backend) for name, scaling, backend in TARGETS if name == kind}
    modes = [mode for mode in ("tensor", "row", "block", "block2d") if (mode, None) in known]
    advice = f"its scaling modes are {', '.join(modes)}" if modes else "it has no scaling modes"
    sized = (
        " (block sizes go with the block modes)"
        if fields.get("block_size") and "block" in modes
        else ""
    )
    return f"{' and '.join(said)} do not fit {kind}: {advice}{sized}"


def _search(flag: str, pattern: str) -> str:
    Regex(pattern, f"{flag} {shortened(pattern)!r}")
    return f"{SEARCH}{pattern}"


def _recipe_arguments(stated: Stated, recipe: Recipe) -> list[str]:
    """The arguments of `fewbits` from which its parser builds this recipe again."""
    primary = recipe.primary
    arguments = ["--format", primary.to_text()]
    if recipe.layer_config and primary.method == get_format(primary.format).method:
        # left out of the wish's text, and meant for the layer-config too
        arguments += ["--method", primary.method]
    for rule in recipe.rules:
        arguments += ["--rule", rule.to_text()] if rule.wish else ["--keep", rule.match]
    arguments += _option("--fallback", recipe.fallback and recipe.fallback.to_text())
    if recipe.heuristics:
        arguments.append("--heur")
    if recipe.layer_config:
        arguments += ["--layer-config", str(stated["recipe"]["layer_config"])]
        arguments += _switches(stated["recipe"], "fullmatch")
    if recipe.preset != "auto":
        arguments += ["--preset", recipe.preset]
    arguments += _option("--seed", recipe.seed)
    return arguments


def _option(flag: str, value: object) -> list[str]:
    """A flag with its value; nothing where there is none (an empty text, a seed of 0)."""
    if value:
        return [flag, str(value)]
    return []


def _switches(fields: dict[str, object], *names: str) -> list[str]:
    return [f"--{name}" for name in names if name in fields]


def _automatic_name(source: Path, wishes: list[Wish]) -> Path:
    mixed = "_mixed" if len({wish.format for wish in wishes}) > 1 else ""
    return _beside(source, f"{wishes[0].format}{mixed}")


def _beside(source: Path, suffix: str) -> Path:
    name = source.name.removesuffix(INDEX) if source.name.endswith(INDEX) else source.stem
    return source.with_name(f"{name}_{suffix}.safetensors")


def _priority_note(stated: Stated) -> list[str]:
    types = stated.get("primary", {}).get("type", ())
    if len(types) < 2 or set(types) == {"int8", "convrot"}:
        return []
    winner = next(name for name in PRIORITY if name in types)
    return [f"several formats were named; {winner} is used ({' > '.join(PRIORITY)})"]


def _input_scale_note(stated: Stated, wishes: list[Wish]) -> list[str]:
    """An input scale is measured or left out; nothing here measures it."""
    if "input_scale" not in stated.get("refused", {}):
        return []
    names = (wish.format for wish in wishes)
    needy = next((name for name in names if get_format(name).largest_input), None)
    if needy:
        raise RecipeError(
            f"--input_scale: {needy} quantizes activations with it, so it must be measured, and "
            "there is no calibration; leave it out (activations are then scaled as they come)"
        )
    return ["--input_scale: these formats store none; nothing is written"]
