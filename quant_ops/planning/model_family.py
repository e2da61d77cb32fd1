"""Recognise model families from key names, and load the preset of each; all knowledge is in
recipes/*.toml.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import RecipeError, closest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

RECIPES = Path(__file__).parent.parent / "recipes"
WIDTHS = "widths"  # the table of families.toml that is not a family


@dataclass(frozen=True)
class Family:
    """One entry of families.toml.

    `keys` must all exist under one common prefix and none of `without`; `kind` is "diffusion",
    "text" or "refuse". `stock` is False where stock ComfyUI would read quantized layers of this
    family as plain numbers. `widths` names the entry of the widths table, the family's own name
    unless stated.
    """

    name: str
    title: str
    kind: str
    keys: tuple[str, ...]
    without: tuple[str, ...] = ()
    preset: str = ""
    stock: bool = True
    why: str = ""
    widths: str = ""


@dataclass(frozen=True)
class Part:
    """A recognised model inside a file: everything under `prefix`."""

    family: Family
    prefix: str


@dataclass(frozen=True)
class Group:
    """Layers that a preset keeps or leaves out, and why."""

    match: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Preset:
    """`exclude` is kept (or becomes the fallback format), `drop` is left out of the file."""

    name: str
    exclude: tuple[Group, ...] = ()
    drop: tuple[Group, ...] = ()


def _load(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def families() -> tuple[Family, ...]:
    """All families, in the order in which they are tried."""
    lists = ("keys", "without")
    return tuple(
        Family(
            name=name,
            **{key: tuple(value) if key in lists else value for key, value in entry.items()},
        )
        for name, entry in _load(RECIPES / "families.toml").items()
        if name != WIDTHS
    )


@cache
def width_layers(family: str | None) -> tuple[str, ...]:
    """Patterns of the layers whose width ComfyUI reads to recognise a family; of all families for
    None.
    """
    table = _load(RECIPES / "families.toml")[WIDTHS]
    if family is not None:
        entry = next((known.widths for known in families() if known.name == family), "")
        return tuple(table.get(entry or family, ()))
    return tuple(dict.fromkeys(pattern for patterns in table.values() for pattern in patterns))


@cache
def preset_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml") if path.stem != "families"))


@cache
def load_preset(name: str) -> Preset:
    """A preset by name, or several joined by `+`; `none` is the empty one.

    Raises:
        RecipeError: no such preset; the message suggests the closest and lists those that exist.
    """
    if "+" in name:
        parts = [load_preset(part) for part in name.split("+")]
        return Preset(
            name,
            *(
                tuple(group for part in parts for group in getattr(part, what))
                for what in ("exclude", "drop")
            ),
        )
    if name == "none":
        return Preset("none")
    if name not in preset_names():
        guess = closest(name, preset_names())
        hint = f", did you mean {guess!r}?" if guess else ";"
        raise RecipeError(
            f"unknown preset {name!r}{hint} known: auto, none, {', '.join(preset_names())}"
        )
    table = _load(RECIPES / f"{name}.toml")
    included = [load_preset(part) for part in table.get("include", ())]
    groups = {
        what: (
            *(group for part in included for group in getattr(part, what)),
            *(Group(tuple(entry["match"]), entry["why"]) for entry in table.get(what, ())),
        )
        for what in ("exclude", "drop")
    }
    return Preset(name, **groups)


def find_parts(names: Iterable[str]) -> tuple[Part, ...]:
    """Every recognised model part of a file, longest prefix first.

    A family matches under a prefix when all its keys exist there; the prefix is read off the first
    key, so nested checkpoints and bare files need no list of known prefixes.
    """
    keys = set(names)
    parts = []
    for family in families():
        first = family.keys[0]
        for key in keys:
            prefix = key[: -len(first)]
            if not key.endswith(first) or (prefix and not prefix.endswith(".")):
                continue
            if all(prefix + k in keys for k in family.keys) and not any(
                prefix + k in keys for k in family.without
            ):
                parts.append(Part(family, prefix))
    return tuple(sorted(parts, key=lambda part: (-len(part.prefix), part.family.name)))
