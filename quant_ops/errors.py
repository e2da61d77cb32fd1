"""Errors a user can act on: what, where, got, allowed, what to do. Every door shows them as one
line.
"""

import difflib
from collections.abc import Iterable


class QuantError(Exception):
    """Base of all FewBits errors; a door turns it into one line and exit status 2, or into a node
    error.
    """


class CheckpointError(QuantError):
    """A file is damaged, hostile, missing, unwritable or not what its name says."""


class RecipeError(QuantError):
    """A wish that cannot be fulfilled: unknown names, contradicting or malformed options."""


class UnsupportedLayerError(QuantError):
    """A layer that is read correctly but cannot run or be written here."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a mistyped one is most like; None if it is like none."""
    return next(iter(difflib.get_close_matches(name, known, 1, 0.6)), None)
