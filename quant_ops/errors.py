"""Errors a user can act on: what, where, got, allowed, what to do. Every door shows them as one
line.
"""

from __future__ import annotations

from collections.abc import Iterable

# Characters of a message: 100 problems of a layer-config fit.
LONGEST = 16_000
LONGEST_NAME = 200  # what is longer is no slip of the fingers


class QuantError(Exception):
    """Base of all FewBits errors; a door turns it into one line and exit status 2, or into a node
    error.

    Attributes:
        option: the setting that answers it ("shapes", "overwrite"), by its name in the core; a
            door that has a flag or an input for it says so.
    """

    def __init__(self, message: str, option: str = ""):
        super().__init__(_readable(message))
        self.option = option

    def at(self, where: str) -> QuantError:
        """The same error, saying where."""
        return type(self)(f"{where}: {self}", self.option)


class CheckpointError(QuantError):
    """A file is damaged, hostile, missing, unwritable or not what its name says."""


class RecipeError(QuantError):
    """A wish that cannot be fulfilled: unknown names, contradicting or malformed options."""


class SourceError(RecipeError):
    """A wish that this model cannot fulfil; whoever knows its file adds the name."""


class UnsupportedLayerError(QuantError):
    """A layer that is read correctly but cannot run or be written here."""


def _readable(message: str) -> str:
    """The message, or both of its ends: what a stranger's file is quoted with may be of any
    length.
    """
    if len(message) <= LONGEST:
        return message
    end = LONGEST // 4
    left_out = len(message) - LONGEST
    return f"{message[: LONGEST - end]} ... ({left_out:,} characters more) ... {message[-end:]}"


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one is most like; None if it is like none."""
    if len(name) > LONGEST_NAME:
        return None
    import difflib  # only where something is misspelt: --help does not wait for it

    return next(iter(difflib.get_close_matches(name, known, 1, 0.6)), None)


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "known") -> str:
    """`, did you mean 'x'?`, else everything that is known after the word `otherwise`, if there is
    one.
    """
    names = list(known)
    guess = closest(str(name), names)
    if guess:
        return f", did you mean {guess!r}?"
    if otherwise:
        return f"; {otherwise}: {', '.join(names) or 'none'}"
    return ""


def visible(text: str) -> str:
    """Text on one line, without characters that a terminal obeys: control characters, marks that
    turn the direction of writing, and halves of characters are spelled as escapes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)
