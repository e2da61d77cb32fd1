"""Patterns on layer names: exact, glob (`fnmatch` syntax, `*` crosses dots) or, with a `re:` prefix, regular expression."""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache

from ..errors import RecipeError

REGEX = "re:"


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern:
    if not pattern.startswith(REGEX):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern[len(REGEX) :])
    except re.error as error:
        raise RecipeError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def check_pattern(pattern: str) -> str:
    """Return the pattern if it is usable.

    Raises:
        RecipeError: empty, or an invalid regular expression.
    """
    if not pattern or pattern == REGEX:
        raise RecipeError("a pattern may not be empty; write a layer name, or a glob such as 'double_blocks.*'")
    _compiled(pattern)
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern names this layer: equal text, whole-name glob (case-sensitive), or `re:` matched whole."""
    return pattern == name or _compiled(pattern).fullmatch(name) is not None
