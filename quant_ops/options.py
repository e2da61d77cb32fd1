"""Options of formats and methods: frozen dataclasses whose fields state type, default and what is
allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import ClassVar, Protocol

from .errors import RecipeError, did_you_mean


class Said(Protocol):
    """Something that a report says as JSON."""

    def to_json(self) -> dict: ...


@dataclass(frozen=True)
class Options:
    """Fields with defaults, checked when an object is made.

    `choices` lists the values that may be stated, `ranges` closed intervals. A field whose default
    is None may stay None; its type is then that of its choices.
    """

    choices: ClassVar[Mapping[str, tuple]] = {}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        for name in self.names():
            value = getattr(self, name)
            if value is None and self.default(name) is None:
                continue
            if type(value) is int and self.kind(name) is float:
                value = float(value)  # 1 is a fine way to write 1.0
                object.__setattr__(self, name, value)
            self.check(name, value, self.readable(name))

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """The options in the order in which they are listed and written."""
        return tuple(entry.name for entry in fields(cls))

    @classmethod
    @cache
    def default(cls, name: str) -> object:
        return next(entry.default for entry in fields(cls) if entry.name == name)

    @classmethod
    def kind(cls, name: str) -> type:
        """The type of an option's values."""
        default = cls.default(name)
        return type(cls.choices[name][0] if default is None else default)

    @classmethod
    def values(cls, name: str) -> tuple:
        """What may be stated for an option; () for one without a list, and for one that is not
        here.
        """
        if name in cls.choices:
            return tuple(cls.choices[name])
        if name in cls.names() and cls.kind(name) is bool:
            return (False, True)
        return ()

    @classmethod
    def readable(cls, name: str) -> tuple:
        """What an option may hold: what may be stated, and what files hold beside it."""
        return cls.values(name)

    @classmethod
    def check(cls, name: str, value: object, allowed: tuple) -> None:
        """Refuse a value of another type, outside its range, or not among those allowed.

        Raises:
            RecipeError: what is allowed, and the closest value.
        """
        kind = cls.kind(name)
        kinds = {kind, *map(type, allowed)}  # "auto" may stand beside true and false
        if type(value) not in kinds and not (kind is float and type(value) is int):
            raise RecipeError(f"{name} must be {kind.__name__}, got {value!r}")
        if allowed and value not in allowed:
            listed = ", ".join(map(option_text, allowed))
            guess = ""
            if kind is str:
                guess = did_you_mean(value, allowed, otherwise="")
            raise RecipeError(f"{name} must be one of {listed}; got {value!r}{guess}")
        low, high = cls.ranges.get(name, (value, value))
        if not low <= value <= high:
            raise RecipeError(f"{name} must be from {low:g} to {high:g}, got {value!r}")

    def as_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.names()}

    def stated(self) -> dict[str, object]:
        """The options that say something, for JSON and for printing: neither None nor False."""
        items = self.as_dict().items()
        return {name: value for name, value in items if value not in (None, False)}


def stated(**facts: object) -> dict[str, object]:
    """The facts that say something: neither None nor False nor empty."""
    return {name: value for name, value in facts.items() if value}


def as_json(items: Iterable[Said]) -> list[dict]:
    """What each item says of itself."""
    return [item.to_json() for item in items]


def option_text(value: object) -> str:
    """A value as users write it: `true`, `auto`, `128`."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


class Configurable:
    """A format or a method: it has a name, and options that a user may state."""

    noun: ClassVar[str]
    name: str
    Options: type[Options] = Options

    def configure(self, stated: Mapping[str, object]) -> Options:
        """Defaults with the stated options in their place.

        Raises:
            RecipeError: an option that is not here, of another type or not allowed.
        """
        known = self.Options.names()
        for name in stated:
            if name not in known:
                guess = did_you_mean(name, known, otherwise="it allows")
                raise RecipeError(f"{self.noun} {self.name} has no option {name!r}{guess}")
        with self.named_in_errors():
            for name, value in stated.items():
                self.Options.check(name, value, self.Options.values(name))
            return self.Options(**stated)

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """What is refused inside says whose option it is."""
        try:
            yield
        except RecipeError as error:
            raise RecipeError(f"{self.noun} {self.name}: {error}") from None
