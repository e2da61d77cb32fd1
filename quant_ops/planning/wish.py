"""Wish: a format with options and a method with options, from text or a table; checked, defaults
filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain

from ..errors import RecipeError, did_you_mean
from ..formats import FORMATS, Format, FormatOptions, get_format, wished_format
from ..methods import get_method
from ..options import option_text


@dataclass(frozen=True)
class Wish:
    """What a layer shall become. `method_options` holds (name, value) pairs that differ from the
    method's defaults.

    On the way in `format` may be a short name and `options` those that are stated; afterwards they
    are the format's full name, and its options with defaults. A short name may mean options too,
    where they are not stated.
    `method` is None only on the way in: the format's own is meant, and stands there afterwards.
    `names_method` keeps whether it was named, for layer-config entries that leave it to the
    primary; such wishes are equal otherwise.
    """

    format: str
    options: FormatOptions | Mapping[str, object] = field(default_factory=dict)
    method: str | None = None
    method_options: tuple[tuple[str, object], ...] = ()
    names_method: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        format = wished_format(self.format)
        if type(self.options) is not format.Options:
            stated = {**format.meant_by(self.format), **_said(self.options)}
            object.__setattr__(self, "options", format.configure(stated))
        object.__setattr__(self, "format", format.name)
        object.__setattr__(self, "names_method", bool(self.method or self.method_options))
        if self.method is None:
            object.__setattr__(self, "method", format.method)
        object.__setattr__(
            self, "method_options", _method_options(self.method, dict(self.method_options))
        )

    def to_json(self) -> dict:
        return {
            "format": self.format,
            "method": self.method,
            **self.options.stated(),
            **dict(self.method_options),
        }

    def to_text(self) -> str:
        """As `parse_wish` reads it: `FORMAT[:option=value,...]`, with nothing that is a default."""
        unstated = get_format(self.format).configure({}).stated()
        options = {
            name: value
            for name, value in self.options.stated().items()
            if unstated.get(name) != value
        }
        if self.method != get_format(self.format).method:
            options["method"] = self.method
        options |= dict(self.method_options)
        items = [f"{name}={option_text(value)}" for name, value in options.items()]
        return ":".join(filter(None, [self.format, ",".join(items)]))

    def become(self, format: str, stated: Mapping[str, object]) -> Wish:
        """The wish where another format takes over: precision goes along, a method unless it is the
        format's own.
        """
        precise = self.options.full_precision_matrix_mult
        options = {**stated, "full_precision_matrix_mult": precise}
        if format != self.format and self.method == get_format(self.format).method:
            return Wish(format, options)
        return replace(self, format=format, options=options)


def parse_wish(text: str) -> Wish:
    """`FORMAT[:option=value,...]` -> Wish; the method's own options stand in the same list.

    FORMAT is a format's name, or a short one: fp8, int8, nf4, fp4.
    """
    name, _, tail = text.partition(":")
    table: dict[str, object] = {"format": name}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"{text!r}: option {item!r} needs a value, as in {item}=...")
        table[key] = parse_value(value)
    return wish_from_table(text, table)


def wish_from_table(where: str, table: dict) -> Wish:
    """Build a Wish from a parsed table; format options, `method` and the method's options are keys
    beside `format`.
    """
    typed(where, table, dict)
    names = {
        key: typed(f"{where}: {key}", table[key], str)
        for key in ("format", "method")
        if key in table
    }
    format = wished_format(names["format"]) if "format" in names else Format
    method_names = tuple(get_method(names.get("method", format.method)).options)
    known_keys(where, table, {"format", "method", *option_names(), *method_names})
    if "format" not in table:
        raise RecipeError(f"{where}: 'format' is required")
    return Wish(
        names["format"],
        {key: table[key] for key in option_names() if key in table},
        names.get("method"),
        tuple((key, table[key]) for key in method_names if key in table),
    )


def option_names() -> tuple[str, ...]:
    """The options of all formats."""
    names = (format.Options.names() for format in FORMATS.values())
    return tuple(dict.fromkeys(chain.from_iterable(names)))


def parse_value(text: str) -> object:
    """`true`, `false`, an integer, a decimal number, or the text itself."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def known_keys(where: str, table: dict, known: set[str]) -> None:
    """Refuse a key that is not in `known`, with the closest one.

    Raises:
        RecipeError: the first unknown key.
    """
    for key in table:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{did_you_mean(key, sorted(known))}")


def typed(where: str, value: object, kind: type) -> object:
    """The value, if it has exactly this type (a bool is not an int).

    Raises:
        RecipeError: another type.
    """
    if type(value) is not kind:
        raise RecipeError(f"{where} must be {kind.__name__}, got {value!r}")
    return value


def _said(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if value is not None}


def _method_options(method: str, stated: dict[str, object]) -> tuple[tuple[str, object], ...]:
    """The stated options in the method's own order, without those that equal its defaults."""
    chosen = get_method(method)
    configured = asdict(chosen.configure(stated))
    return tuple(
        (name, value) for name, value in configured.items() if value != chosen.options[name]
    )
