"""Recipe: the user's wish, put together from drafts: arguments, TOML, nodes; unknown keys are
errors.

preset = "auto"                      # auto | none | file names of recipes/, joined by +
seed = 0
heuristics = false                   # true: layers that gain nothing by their shape count as
excluded [primary]
format = "int8_tensorwise"
scaling = "row"
method = "nearest"                   # default: the format's own; the method's options follow it
[fallback]                           # for what preset and heuristics exclude; absent = keep
format = "float8_e4m3fn"
[[rule]]                             # first match decides
match = "double_blocks.0.*"
format = "float8_e4m3fn"             # or: keep = true
heuristics = false                   # true: keep what gains nothing by its shape
[layer_config]                       # the layer-config JSON as a table: docs/rules.md
"img_in" = { skip = true }
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from ..errors import RecipeError
from ..files import read_text
from ..options import as_json, stated
from ..spec import compact_json
from ..strict_json import MAX_DEPTH, check
from .layer_config import LayerConfig, parse_layer_config
from .match import check_pattern
from .wish import Wish, known_keys, parse_wish, typed, wish_from_table

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

__all__ = [
    "Draft",
    "Recipe",
    "Rule",
    "Wish",
    "draft_from_table",
    "draft_from_text",
    "draft_from_toml",
    "parse_rule",
    "parse_wish",
    "recipe_from_table",
    "recipe_from_toml",
    "recipe_to_toml",
    "rule_from",
]

T = TypeVar("T")

KEYS = {
    "primary",
    "fallback",
    "rule",
    "preset",
    "seed",
    "heuristics",
    "layer_config",
    "layer_config_fullmatch",
}
# PATTERN=FORMAT[:option=value,...]; the pattern ends at the first = whose right side reads as a
# wish
RULE = re.compile(r"(.+?)=(\w+(?::\w+=[^,:=]+(?:,\w+=[^,:=]+)*)?)")


@dataclass(frozen=True)
class Rule:
    """One line of the user's own tier: layers that match get the wish, or are kept when it is None.

    With `heuristics`, matching layers that gain nothing by their shape are kept.
    """

    match: str
    wish: Wish | None
    heuristics: bool = False

    def __post_init__(self) -> None:
        check_pattern(self.match)

    def to_json(self) -> dict:
        action = {"keep": True}
        if self.wish:
            action = self.wish.to_json()
        return {"match": self.match, **action, **stated(heuristics=self.heuristics)}

    def to_text(self) -> str:
        """As `parse_rule` reads it."""
        text = f"{self.match}={self.wish.to_text() if self.wish else 'keep'}"
        if not self.heuristics:
            return text
        first = self.wish is None or ":" not in self.wish.to_text()
        return f"{text}{':' if first else ','}heuristics=true"


@dataclass(frozen=True)
class Recipe:
    """What the user wants. `primary` None keeps everything as it is (a plain, verified copy)."""

    primary: Wish | None
    rules: tuple[Rule, ...] = ()
    fallback: Wish | None = None
    preset: str = "auto"
    seed: int = 0
    layer_config: LayerConfig | None = None
    heuristics: bool = False

    @property
    def mark(self) -> str:
        """What an automatic file name says: the format, and whether rules add others."""
        stating = [*self.rules]
        if self.layer_config:
            stating += self.layer_config.entries
        wishes = filter(None, [self.fallback, *(each.wish for each in stating)])
        primary = self.primary.format
        others = {wish.format for wish in wishes} - {primary}
        if others:
            return f"{primary}_mixed"
        return primary

    def to_json(self) -> dict:
        return {
            "primary": self.primary and self.primary.to_json(),
            "rules": as_json(self.rules),
            "fallback": self.fallback and self.fallback.to_json(),
            "preset": self.preset,
            "seed": self.seed,
            "layer_config": self.layer_config and self.layer_config.to_json(),
            "heuristics": self.heuristics,
        }

    def to_text(self) -> str:
        """The text stored as `fewbits.recipe`: equal recipes give equal text; no paths."""
        return compact_json(self.to_json())


@dataclass(frozen=True)
class Draft:
    """A recipe in the making: what has been stated so far; None and empty where nothing has."""

    primary: Wish | None = None
    rules: tuple[Rule, ...] = ()
    fallback: Wish | None = None
    preset: str | None = None
    seed: int | None = None
    layer_config: LayerConfig | None = None
    heuristics: bool = False

    def over(self, base: Draft) -> Draft:
        """Both in one: the rules of this one come first, and where both state a value, this one's
        counts.

        Raises:
            RecipeError: both have a primary wish, or both a layer-config; neither can give way in
                part.
        """
        for name in ("primary", "layer_config"):
            if getattr(self, name) and getattr(base, name):
                raise RecipeError(
                    f"two recipes are combined and both have a [{name}]; delete one of them"
                )
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        stated = {
            name: value
            for name, value in values.items()
            if value is not None and value is not False
        }
        return replace(base, **{**stated, "rules": (*self.rules, *base.rules)})

    def finish(self) -> Recipe:
        """The recipe, with defaults for what nobody stated.

        Raises:
            RecipeError: no primary wish.
        """
        if self.primary is None:
            raise RecipeError("a [primary] table with a format is required")
        preset = "auto"
        if self.preset is not None:
            preset = self.preset
        return Recipe(
            primary=self.primary,
            rules=self.rules,
            fallback=self.fallback,
            preset=preset,
            seed=self.seed or 0,
            layer_config=self.layer_config and self.layer_config.under(self.primary),
            heuristics=self.heuristics,
        )


def recipe_from_toml(path: Path) -> Recipe:
    """Read a complete recipe file; see `draft_from_toml`."""
    path = Path(path)
    return _named(path.name, draft_from_toml(path).finish)


def recipe_from_table(table: dict) -> Recipe:
    """Build a Recipe from parsed TOML or JSON tables."""
    return draft_from_table(table).finish()


def draft_from_toml(path: Path) -> Draft:
    """Read a recipe file, of which [primary] may be missing.

    Raises:
        RecipeError: unreadable, not TOML, unknown or wrongly typed keys, unknown formats or
            methods.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise RecipeError(f"recipe not found: {path}")
    return draft_from_text(read_text(path, RecipeError), path.name)


def draft_from_text(text: str, name: str) -> Draft:
    """Read TOML text; `name` says in errors where it came from."""
    return _named(name, lambda: draft_from_table(_parsed(text)))


# What TOML's text is made of where a dot does not join keys, and keys with all their parts.
_PART = r"""(?:[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
PART = re.compile(_PART)
KEY = re.compile(
    rf"""
      \"{{3}}(?:[^\\]|\\.)*?\"{{3}} | '{{3}}.*?'{{3}} | \#[^\n]*
    | (?P<key>{_PART}(?:[ \t]*\.[ \t]*{_PART})*)
    """,
    re.VERBOSE | re.DOTALL,
)


def _refuse_long_keys(text: str) -> None:
    """A key of 40,000 parts would take the parser half a minute.

    Raises:
        ValueError: one has more parts than anything here is deep.
    """
    for found in KEY.finditer(text):
        key = found["key"]
        if key and key.count(".") > MAX_DEPTH and len(PART.findall(key)) > MAX_DEPTH:
            raise ValueError(f"a key has more than {MAX_DEPTH} parts")


def _parsed(text: str) -> dict:
    try:
        _refuse_long_keys(text)
        table = tomllib.loads(text)
        check(table)
    except (ValueError, RecursionError) as error:
        raise RecipeError(str(error)) from None
    return table


def draft_from_table(table: dict) -> Draft:
    """Build a Draft from parsed TOML or JSON tables."""
    known_keys("top level", table, KEYS)
    config = None
    if "layer_config" in table:
        fullmatch = typed(
            "layer_config_fullmatch", table.get("layer_config_fullmatch", False), bool
        )
        config = parse_layer_config(table["layer_config"], fullmatch=fullmatch)
    wishes = {
        name: wish_from_table(name, table[name])
        for name in ("primary", "fallback")
        if name in table
    }
    return Draft(
        **wishes,
        rules=tuple(_rule(entry) for entry in typed("rule", table.get("rule", []), list)),
        preset=_optional(table, "preset", str),
        seed=_optional(table, "seed", int),
        layer_config=config,
        heuristics=typed("heuristics", table.get("heuristics", False), bool),
    )


def _named(name: str, read: Callable[[], T]) -> T:
    """What `read` returns; its refusals name the recipe."""
    try:
        return read()
    except RecipeError as error:
        raise RecipeError(f"recipe {name}: {error}") from None


def recipe_to_toml(recipe: Recipe) -> str:
    """TOML text that `recipe_from_toml` reads back as an equal recipe.

    Raises:
        RecipeError: a recipe without a primary wish, which only inspection uses.
    """
    if recipe.primary is None:
        raise RecipeError("a recipe that keeps everything has no text form")
    lines = [
        f"preset = {_toml(recipe.preset)}",
        f"seed = {recipe.seed}",
        f"heuristics = {_toml(recipe.heuristics)}",
    ]
    config = recipe.layer_config
    if config:
        lines.append(f"layer_config_fullmatch = {_toml(config.fullmatch)}")
    lines += ["", "[primary]", *_pairs(recipe.primary.to_json())]
    if recipe.fallback:
        lines += ["", "[fallback]", *_pairs(recipe.fallback.to_json())]
    for rule in recipe.rules:
        lines += ["", "[[rule]]", *_pairs(rule.to_json())]
    if config:
        lines += ["", "[layer_config]", *_pairs(config.to_table())]
    return "\n".join(lines) + "\n"


def _optional(table: dict, name: str, kind: type) -> object | None:
    if name not in table:
        return None
    return typed(name, table[name], kind)


def parse_rule(text: str) -> Rule:
    """`PATTERN=FORMAT[:option=value,...]` (the command line's --rule) -> Rule; FORMAT `keep`
    keeps.
    """
    found = RULE.fullmatch(text)
    if not found:
        raise RecipeError(f"rule {text!r}: write PATTERN=FORMAT or PATTERN=FORMAT:option=value,...")
    return rule_from(*found.groups())


def rule_from(pattern: str, action: str) -> Rule:
    """A pattern and `FORMAT[:option=value,...]` or `keep` -> Rule."""
    name, _, options = action.partition(":")
    kept = [
        item
        for item in options.split(",")
        if item not in ("", "heuristics=true", "heuristics=false")
    ]
    plain = ":".join(filter(None, [name, ",".join(kept)]))
    judged = "heuristics=true" in action
    if plain == "keep":
        return Rule(pattern, None, heuristics=judged)
    return Rule(pattern, parse_wish(plain), heuristics=judged)


def _rule(entry: dict) -> Rule:
    typed("rule", entry, dict)
    if "match" not in entry:
        raise RecipeError("a [[rule]] needs 'match'")
    match = typed("match", entry["match"], str)
    judged = typed(f"rule {match!r}: heuristics", entry.get("heuristics", False), bool)
    rest = {
        key: value for key, value in entry.items() if key not in ("match", "keep", "heuristics")
    }
    if typed("keep", entry.get("keep", False), bool):
        if rest:
            raise RecipeError(f"rule {match!r}: keep = true allows no {', '.join(rest)}")
        return Rule(match, None, judged)
    return Rule(match, wish_from_table(f"rule {match!r}", rest), judged)


def _pairs(table: dict) -> list[str]:
    return [
        f"{key if key.isidentifier() and key.isascii() else _toml(key)} = {_toml(value)}"
        for key, value in table.items()
    ]


def _toml(value: object) -> str:
    """JSON's spelling is TOML's for strings, numbers, booleans and lists of them; tables are
    inline.
    """
    if isinstance(value, dict):
        return "{ " + ", ".join(_pairs(value)) + " }"
    # JSON writes what is outside the basic plane as two surrogates, which TOML forbids, as it does
    # a plain DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
