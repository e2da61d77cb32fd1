"""The layer-config JSON: validate it, rank its patterns.

Every problem of a file is collected before anything is refused. Settings that do not apply are
warnings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path

from ..errors import RecipeError, did_you_mean
from ..files import read_text
from ..formats import FORMATS, Format, find_format, option_values, read_as
from ..formats.base import PRECISE, unknown_format
from ..methods import METHODS
from ..options import option_text
from ..strict_json import check, shown
from .match import REGEX, Regex, check_pattern, closed, shortened
from .wish import Wish, option_names

DEFAULT, EXCLUSIONS = "_default", "_exclusions"
# settings that are no option of a format, or spelled otherwise there
OWN_SETTINGS: dict[str, type | tuple] = {
    "format": str,
    "skip": bool,
    "group_size": int,
    "method": str,
    "simple": bool,
}
SCALING, SCALING_MODE = "scaling", "scaling_mode"  # the option and its name in this file
# problems of a file that come with a guess at what was meant: 4,000 guesses took a second
HINTED = 100
ALIASES = {"group_size": "block_size"}
LISTED = 5  # entries named when many have the same problem


def settings_allowed() -> dict[str, type | tuple]:
    """setting -> type; a tuple lists the values where they do not depend on the format."""
    options: dict[str, type | tuple] = {}
    for format in FORMATS.values():
        options |= {name: _allowed(format, name) for name in format.Options.names()}
    options.pop(SCALING)
    return {**OWN_SETTINGS, **options, SCALING_MODE: option_values(SCALING)}


def _allowed(format: Format, option: str) -> type | tuple:
    """The type of an option's values, or the values where they are of several types."""
    values = format.Options.values(option)
    mixed = len(set(map(type, values))) > 1
    if mixed:
        return values
    return format.Options.kind(option)


class LayerConfigError(RecipeError):
    """A malformed layer-config; `problems` are all of them."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Entry:
    """A pattern of the file: layers get the wish, or are kept when it is None. `position` counts
    through the file.
    """

    pattern: str
    wish: Wish | None
    position: int
    exclusion: bool = False


@dataclass(frozen=True)
class Ranked:
    """A pattern as a rule: `match` is what `match.matches` takes, `entry` where it came from."""

    match: str
    entry: Entry


@dataclass(frozen=True)
class LayerConfig:
    """A checked layer-config. `default` closes it: a wish, or an Entry without one to keep; None
    where absent.

    `stated` is the file's own object, from which `under` reads it again.
    """

    entries: tuple[Entry, ...]
    default: Entry | None = None
    fullmatch: bool = False
    warnings: tuple[str, ...] = ()
    stated: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)

    def under(self, primary: Wish) -> LayerConfig:
        """The same file where this wish fills in what its entries leave unsaid."""
        return parse_layer_config(dict(self.stated), fullmatch=self.fullmatch, unstated=primary)

    def ranked(self, names: Iterable[str]) -> tuple[Ranked, ...]:
        """All patterns as one list in which the first match wins, for a model with these base
        names.
        """
        names = set(names)
        rules = [
            (0, 0, 0, entry, escape(entry.pattern))
            for entry in self.entries
            if entry.pattern in names
        ]
        for entry in self.entries:
            match = REGEX + entry.pattern if self.fullmatch else entry.pattern
            rank, literal, wildcards = pattern_rank(entry.pattern, fullmatch=self.fullmatch)
            if wildcards or entry.pattern not in names:
                rules.append((rank, -literal, wildcards, entry, match))
        rules.sort(key=lambda rule: (*rule[:3], not rule[3].exclusion, rule[3].position))
        return tuple(Ranked(match, entry) for *_, entry, match in rules)

    def to_json(self) -> dict:
        """Order is kept in lists, as the last criterion of the ranking is the position."""
        return {
            "entries": [{"match": entry.pattern, **_setting(entry)} for entry in self.entries],
            "default": self.default and _setting(self.default),
            "fullmatch": self.fullmatch,
        }

    def to_table(self) -> dict:
        """The file's own schema again."""
        table: dict[str, object] = {DEFAULT: _table(self.default)} if self.default else {}
        for entry in self.entries:
            if entry.exclusion:
                table.setdefault(EXCLUSIONS, []).append(entry.pattern)
            else:
                table[entry.pattern] = _table(entry)
        return table


def specificity(pattern: str, base: str, *, fullmatch: bool = False) -> tuple[int, int, int]:
    """(rank, literal length, wildcards) of a pattern for one layer; lower rank, more literal, fewer
    wildcards win.
    """
    if pattern == base:
        return (0, len(pattern), 0)
    return pattern_rank(pattern, fullmatch=fullmatch)


def pattern_rank(pattern: str, *, fullmatch: bool = False) -> tuple[int, int, int]:
    """`specificity` where the pattern is not the layer's own name: 1 numbered, 2 internal, 3
    prefix, 4 catch-all.
    """
    literal, wildcards, numbered = _measure_regex(pattern) if fullmatch else _measure_glob(pattern)
    if literal == 0:
        rank = 4
    elif numbered and literal >= 8:
        rank = 1
    elif pattern.startswith(("*", ".*", ".+") if fullmatch else "*"):
        rank = 2
    else:
        rank = 3
    return rank, literal, wildcards


# as fnmatch reads it: an unclosed [ is a plain character
CLOSED = "[[]"  # as `closed` writes it
GLOB_PART = re.compile(r"\[!?\]?[^\]]*\]|[*?]")
REGEX_PART = re.compile(
    r"""# a class, a class escape or a dot
        (?P<wild>\[\^?\]?(?:\\.|[^\]\\])*\]|\\[a-zA-Z0-9]|\.)(?:[*+?]|\{[\d,]*\})?[?+]?
      | (?P<literal>\\[^a-zA-Z0-9])  # escaped punctuation
      | (?P<quantifier>(?:[*+?]|\{[\d,]*\})[?+]?)
      | (?P<silent>\(\?(?:P?<\w+>|<?[=!:]|[aiLmsux-]+[:)])|[()|^$])""",
    re.VERBOSE,
)


def _measure_glob(pattern: str) -> tuple[int, int, bool]:
    """(literal characters, wildcards, contains a digit)"""
    parts = [part for part in GLOB_PART.findall(closed(pattern)) if part != CLOSED]
    return len(pattern) - sum(map(len, parts)), len(parts), any(c.isdigit() for c in pattern)


def _measure_regex(pattern: str) -> tuple[int, int, bool]:
    """The same for a regular expression; a class, a dot or a class escape and its quantifier are
    one wildcard.
    """
    literal, wildcards = len(pattern), 0
    for part in REGEX_PART.finditer(pattern):
        literal -= len(part.group()) - (part.lastgroup == "literal")
        wildcards += part.lastgroup in ("wild", "quantifier")
    return literal, wildcards, any(c.isdigit() for c in pattern) or "\\d" in pattern


def load_layer_config(
    path: Path, *, fullmatch: bool = False, unstated: Wish | None = None
) -> LayerConfig:
    """Read and check a file; see `parse_layer_config`."""
    path = Path(path)
    if not os.path.exists(path):
        raise RecipeError(f"layer-config not found: {path}")
    text = read_text(path, RecipeError)
    return parse_layer_config_text(text, str(path), fullmatch=fullmatch, unstated=unstated)


def parse_layer_config_text(
    text: str, name: str, *, fullmatch: bool = False, unstated: Wish | None = None
) -> LayerConfig:
    """Check JSON text; `name` says in errors where it came from."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict:
        table: dict[str, object] = {}
        for key, value in pairs:
            if key in table:
                twice.append(f"layer-config: key {key!r} appears twice")
            table[key] = value
        return table

    try:
        table = json.loads(text, object_pairs_hook=unique)
        check(table)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"layer-config {name} line {error.lineno} column {error.colno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"layer-config {name}: cannot be read ({error})") from None
    return parse_layer_config(table, fullmatch=fullmatch, unstated=unstated, problems=twice)


def parse_layer_config(
    table: object,
    *,
    fullmatch: bool = False,
    unstated: Wish | None = None,
    problems: Iterable[str] = (),
) -> LayerConfig:
    """Check a parsed layer-config.

    Args:
        unstated: where an entry names no `full_precision_matrix_mult`, this wish's is used; where
            it names no method, the method that this wish names, else the format's own.

    Raises:
        LayerConfigError: with every problem found.
    """
    if not isinstance(table, dict):
        raise LayerConfigError([f"layer-config must be a JSON object, got {_kind(table)}"])
    return _Reader(fullmatch, unstated, list(problems)).read(table)


class _Reader:
    """Collects entries, problems and warnings of one layer-config."""

    def __init__(self, fullmatch: bool, unstated: Wish | None, problems: list[str]):
        self.fullmatch, self.unstated, self.problems = fullmatch, unstated, problems
        self.warnings: list[str] = []
        self.entries: list[Entry] = []
        self.empty: list[str] = []
        self.wishes: dict[str, Wish | None] = {}
        self.allowed, self.options = settings_allowed(), frozenset(option_names())

    def read(self, table: dict) -> LayerConfig:
        default = None
        for key, value in table.items():
            if key == EXCLUSIONS:
                self._exclusions(value)
            elif key == DEFAULT:
                if isinstance(value, dict):
                    default = Entry(DEFAULT, self._wish(key, value), len(table))
                else:
                    self.problems.append(
                        f"layer-config: '{DEFAULT}' must be an object, got {_kind(value)}"
                    )
            elif key.startswith("_"):
                self._refuse_near_miss(key)
            else:
                self._pattern(key)
                if isinstance(value, dict):
                    self.entries.append(Entry(key, self._wish(key, value), len(self.entries)))
                else:
                    self.problems.append(
                        f"layer-config entry {key!r} must be an object, got {_kind(value)}"
                    )
        self._report_empty()
        if self.problems:
            raise LayerConfigError(self.problems)
        return LayerConfig(
            tuple(self.entries), default, self.fullmatch, tuple(self.warnings), stated=table
        )

    def _exclusions(self, value: object) -> None:
        if not isinstance(value, list) or not all(
            isinstance(pattern, str) and pattern for pattern in value
        ):
            self.problems.append(f"layer-config: '{EXCLUSIONS}' must be a list of strings")
            return
        for pattern in value:
            self._pattern(pattern)
            self.entries.append(Entry(pattern, None, len(self.entries), exclusion=True))

    def _refuse_near_miss(self, key: str) -> None:
        guess = did_you_mean(key, (DEFAULT, EXCLUSIONS))
        if guess.startswith(", did"):
            self.problems.append(f"layer-config: unknown key {key!r}{guess}")

    def _pattern(self, pattern: str) -> None:
        if not pattern:
            self.problems.append("layer-config: a pattern may not be empty")
            return
        try:
            if self.fullmatch:
                Regex(pattern, f"layer-config entry {shortened(pattern)!r}")
            else:
                check_pattern(pattern)
        except RecipeError as error:
            self.problems.append(str(error))

    def _wish(self, key: str, stated: dict) -> Wish | None:
        """The entry's wish; None to keep. Problems are collected, and then the result is not
        used.
        """
        where = f"layer-config entry {key!r}"
        settings = {name: value for name, value in stated.items() if not name.startswith("_")}
        before = len(self.problems)
        for name, value in settings.items():
            if name not in self.allowed:
                hint = did_you_mean(name, sorted(self.allowed))
                self.problems.append(f"{where}: unknown key {name!r}{hint}")
            elif not _fits(value, self.allowed[name]):
                wanted = _wanted(name, self.allowed[name], settings)
                self.problems.append(f"{where}: {name!r} must be {wanted}, got {_shown(value)}")
        if settings.get("skip") is True:
            ignored = [name for name in settings if name != "skip"]
            if ignored:
                self.warnings.append(f"{where}: skip is true, so {', '.join(ignored)} is ignored")
            return None
        format = self._format(key, where, settings)
        if format is None or len(self.problems) > before:
            return None
        return self._built(where, settings, format)

    def _built(self, where: str, settings: dict, format: Format) -> Wish | None:
        """`_build`, once for all entries that say the same; what it objects to names its entry."""
        key = repr(settings)
        if key in self.wishes:
            return self.wishes[key]
        before = len(self.problems), len(self.warnings)
        wish = self._build(where, settings, format)
        if before == (len(self.problems), len(self.warnings)):
            self.wishes[key] = wish
        return wish

    def _format(self, key: str, where: str, settings: dict) -> Format | None:
        name = settings.get("format")
        if "format" not in settings:
            self.problems.append(f"{where}: 'format' is required (or set \"skip\": true)")
        elif name == "":
            self.empty.append(key)
        elif isinstance(name, str) and find_format(name) is None:
            many = len(self.problems) >= HINTED
            why = f"unknown format {shown(name)}" if many else _unwritable(name)
            self.problems.append(f"{where}: {why}")
        return find_format(name)

    def _report_empty(self) -> None:
        text = "'format' is empty; fill it in, set \"skip\": true, or delete the entry"
        self.problems += [f"layer-config entry {key!r}: {text}" for key in self.empty[:LISTED]]
        if len(self.empty) > LISTED:
            self.problems.append(
                f"layer-config: {len(self.empty) - LISTED} more entries with an empty 'format'"
            )

    def _build(self, where: str, settings: dict, format: Format) -> Wish | None:
        precise = settings.get(PRECISE, self._unstated_precision())
        options = {**format.meant_by(settings["format"]), PRECISE: precise}
        mode = settings.get(SCALING_MODE)
        if mode is not None:
            if mode not in format.Options.values(SCALING):
                self.problems.append(f"{where}: {_contradiction(format, mode)}")
                return None
            # elsewhere it only repeats what the format's name says
            if SCALING in format.layout_options:
                options[SCALING] = mode
        sizes = {settings[alias] for alias in ("block_size", "group_size") if alias in settings}
        if len(sizes) > 1:
            self.problems.append(
                f"{where}: 'block_size' and 'group_size' are one setting and differ"
            )
            return None
        values = {name: settings[name] for name in settings if name in self.options}
        if sizes:
            values["block_size"] = next(iter(sizes))
        for option, value in values.items():
            if option == PRECISE or (value is False and option not in options):
                continue
            spelled = option if option in settings else "group_size"
            allowed = format.Options.values(option)
            if option not in format.Options.names():
                self.warnings.append(
                    f"{where}: {spelled!r} does not apply to {format.name} and is ignored"
                )
            elif allowed and value not in allowed:
                names = ", ".join(map(str, allowed))
                self.problems.append(
                    f"{where}: {spelled!r} must be one of {names}, got {_shown(value)}"
                )
                return None
            else:
                options[option] = value
        return self._with_method(where, settings, Wish(format.name), options)

    def _with_method(
        self, where: str, settings: dict, wish: Wish, options: dict[str, object]
    ) -> Wish | None:
        method, simple = settings.get("method"), settings.get("simple", False)
        if simple and method not in (None, "nearest"):
            self.problems.append(
                f"{where}: simple is true, which means method nearest, and method is {method!r}"
            )
            return None
        if method is not None and method not in METHODS:
            self.problems.append(
                f"{where}: 'method' must be one of {', '.join(sorted(METHODS))}, got {method!r}"
            )
            return None
        method = "nearest" if simple else method
        primary = self.unstated
        if primary and (method == primary.method if method else primary.names_method):
            chosen = {"method": primary.method, "method_options": primary.method_options}
        else:
            chosen = {"method": method or wish.method}
        try:
            return replace(wish, options=options, **chosen)
        except RecipeError as error:
            self.problems.append(f"{where}: {error}")
            return None

    def _unstated_precision(self) -> bool:
        return bool(self.unstated and self.unstated.options.full_precision_matrix_mult)


def _unwritable(name: str) -> str:
    """Why an entry cannot name this format."""
    instead = read_as(name)
    if instead is not None:
        return f"format {name!r} can be read but not written; use {instead.name}"
    return unknown_format(name)


def _contradiction(format: Format, mode: str) -> str:
    """What a format stores, and which one the scaling mode leads to."""
    if not format.Options.values(SCALING):
        return f"format {format.name} takes no scaling_mode; leave it out"
    instead = next((name for name in FORMATS if _leads_to(mode, FORMATS[name], format)), None)
    advice = (
        f"for scaling_mode {mode} use {instead}" if instead else f"it has no scaling_mode {mode}"
    )
    return f"format {format.name} stores {format.stores}; {advice}"


def _leads_to(mode: str, format: Format, named: Format) -> bool:
    """Whether a mode beside the named format means this one: the same codes, other scales."""
    if format is named or format.code_dtype != named.code_dtype:
        return False
    return mode in (*format.Options.values(SCALING), *format.modes_meant)


def _fits(value: object, kind: type | tuple) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    return type(value) is kind


def _wanted(name: str, kind: type | tuple, settings: dict) -> str:
    """What a setting of the wrong type may be, in words."""
    if isinstance(kind, tuple):
        return f"one of {', '.join(map(option_text, kind))}"
    if kind is bool:
        return "true or false"
    values = _values(name, settings.get("format"))
    if values:
        return f"one of {', '.join(map(str, values))}"
    if name == "format":
        return "a format's name"
    return "text"


def _values(name: str, format: object) -> list:
    """What a setting may be in an entry's format, or in any if it has no such option."""
    if name == "method":
        return sorted(METHODS)
    option = ALIASES.get(name, name)
    named = find_format(format)
    if named and named.Options.values(option):
        return sorted(named.Options.values(option))
    return sorted(option_values(option))


def _shown(value: object) -> str:
    return f"{value!r} ({_kind(value)})"


def _kind(value: object) -> str:
    return type(value).__name__


def _setting(entry: Entry) -> dict:
    if entry.wish:
        return entry.wish.to_json()
    return {"skip": True}


def _table(entry: Entry) -> dict:
    """An entry in the file's schema; method options other than the recipe's own cannot be said
    there.
    """
    if entry.wish is None:
        return {"skip": True}
    options = entry.wish.options.stated()
    scaling = {SCALING_MODE: options.pop(SCALING)} if SCALING in options else {}
    precise = {PRECISE: options.pop(PRECISE, False)}
    return {
        "format": entry.wish.format,
        **scaling,
        **options,
        "method": entry.wish.method,
        **precise,
    }
