"""Recipe: the user's wish, from arguments or TOML; unknown keys are errors.

    preset = "auto"                      # auto | none | a file name of recipes/
    seed = 0
    [primary]
    format = "int8_tensorwise"
    scaling = "row"
    method = "nearest"
    [fallback]                           # for what the preset keeps; absent = keep
    format = "float8_e4m3fn"
    [[rule]]                             # first match decides
    match = "double_blocks.0.*"
    format = "float8_e4m3fn"             # or: keep = true
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import RecipeError
from ..formats import get_format
from ..methods import get_method
from ..spec import FormatOptions, compact_json
from .match import check_pattern

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

OPTION_TYPES = {"scaling": str, "block_size": int, "convrot": bool, "convrot_groupsize": int, "linear_dtype": str,
                "full_precision_matrix_mult": bool}  # fmt: skip


@dataclass(frozen=True)
class Wish:
    """A format with options and a method, checked and with defaults filled in."""

    format: str
    options: FormatOptions = FormatOptions()
    method: str = "nearest"

    def __post_init__(self) -> None:
        get_method(self.method)
        object.__setattr__(self, "options", get_format(self.format).resolve(self.options))

    def to_json(self) -> dict:
        return {"format": self.format, "method": self.method, **self.options.stated()}


@dataclass(frozen=True)
class Rule:
    """One line of the user's own tier: layers that match get the wish, or are kept when it is None."""

    match: str
    wish: Wish | None

    def __post_init__(self) -> None:
        check_pattern(self.match)

    def to_json(self) -> dict:
        return {"match": self.match, **(self.wish.to_json() if self.wish else {"keep": True})}


@dataclass(frozen=True)
class Recipe:
    """What the user wants. `primary` None keeps everything as it is (a plain, verified copy)."""

    primary: Wish | None
    rules: tuple[Rule, ...] = ()
    fallback: Wish | None = None
    preset: str = "auto"
    seed: int = 0

    def to_json(self) -> dict:
        return {
            "primary": self.primary and self.primary.to_json(),
            "rules": [rule.to_json() for rule in self.rules],
            "fallback": self.fallback and self.fallback.to_json(),
            "preset": self.preset,
            "seed": self.seed,
        }

    def to_text(self) -> str:
        """The text stored as `fewbits.recipe`: equal recipes give equal text; no paths."""
        return compact_json(self.to_json())


def recipe_from_toml(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: unreadable, not TOML, unknown or wrongly typed keys, unknown formats or methods.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe not found: {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {path.name}: {error}") from None
    try:
        return recipe_from_table(table)
    except RecipeError as error:
        raise RecipeError(f"recipe {path.name}: {error}") from None


def recipe_from_table(table: dict) -> Recipe:
    """Build a Recipe from parsed TOML or JSON tables."""
    _known_keys("recipe", table, {"primary", "fallback", "rule", "preset", "seed"})
    if "primary" not in table:
        raise RecipeError("a [primary] table with a format is required")
    return Recipe(
        primary=_wish("primary", table["primary"]),
        fallback=_wish("fallback", table["fallback"]) if "fallback" in table else None,
        rules=tuple(_rule(entry) for entry in _typed("rule", table.get("rule", []), list)),
        preset=_typed("preset", table.get("preset", "auto"), str),
        seed=_typed("seed", table.get("seed", 0), int),
    )


def parse_rule(text: str) -> Rule:
    """`PATTERN=FORMAT[:option=value,...]` (the command line's --rule) -> Rule; FORMAT `keep` keeps."""
    pattern, equals, wish = text.rpartition("=") if ":" not in text else _split_rule(text)
    if not equals or not pattern or not wish:
        raise RecipeError(f"rule {text!r}: write PATTERN=FORMAT or PATTERN=FORMAT:option=value,...")
    return Rule(pattern, None if wish == "keep" else parse_wish(wish))


def _split_rule(text: str) -> tuple[str, str, str]:
    prefix = "re:" if text.startswith("re:") else ""
    head, colon, options = text[len(prefix) :].partition(":")
    pattern, equals, name = head.rpartition("=")
    return prefix + pattern, equals, name + colon + options


def parse_wish(text: str) -> Wish:
    """`FORMAT[:option=value,...]` -> Wish."""
    name, _, tail = text.partition(":")
    table: dict[str, object] = {"format": name}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"{text!r}: option {item!r} needs a value, as in {item}=...")
        table[key] = _parse_value(value)
    return _wish(text, table)


def _parse_value(value: str) -> object:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.lstrip("-").isdigit() else value


def _rule(entry: dict) -> Rule:
    _typed("rule", entry, dict)
    if "match" not in entry:
        raise RecipeError("a [[rule]] needs 'match'")
    rest = {key: value for key, value in entry.items() if key not in ("match", "keep")}
    if _typed("keep", entry.get("keep", False), bool):
        if rest:
            raise RecipeError(f"rule {entry['match']!r}: keep = true allows no {', '.join(rest)}")
        return Rule(entry["match"], None)
    return Rule(_typed("match", entry["match"], str), _wish(f"rule {entry['match']!r}", rest))


def _wish(where: str, table: dict) -> Wish:
    _typed(where, table, dict)
    _known_keys(where, table, {"format", "method", *OPTION_TYPES})
    if "format" not in table:
        raise RecipeError(f"{where}: 'format' is required")
    options = {key: _typed(f"{where}: {key}", table[key], kind) for key, kind in OPTION_TYPES.items() if key in table}
    method = _typed(f"{where}: method", table.get("method", "nearest"), str)
    return Wish(_typed(f"{where}: format", table["format"], str), FormatOptions(**options), method)


def _known_keys(where: str, table: dict, known: set[str]) -> None:
    for key in table:
        if key not in known:
            guess = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f", did you mean {guess[0]!r}?" if guess else f"; known: {', '.join(sorted(known))}"
            raise RecipeError(f"{where}: unknown key {key!r}{hint}")


def _typed(where: str, value: object, kind: type) -> object:
    if type(value) is not kind:  # a bool is not an int here
        raise RecipeError(f"{where} must be {kind.__name__}, got {value!r}")
    return value


assert set(OPTION_TYPES) == {field.name for field in fields(FormatOptions)}
