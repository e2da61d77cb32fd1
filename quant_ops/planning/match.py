r"""Patterns on layer names: exact, glob (`fnmatch` syntax, `*` crosses dots), or a regular
expression after a prefix.

`re:` must match the whole base name; `search:` may match anywhere in the full key
(`<base>.weight`), which is what the classic command's `--custom-layers` and `--exclude-layers` do.
"""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache

from ..errors import RecipeError

REGEX, SEARCH = "re:", "search:"


@lru_cache(maxsize=8192)
def _compiled(pattern: str) -> re.Pattern:
    prefix = next((prefix for prefix in (REGEX, SEARCH) if pattern.startswith(prefix)), None)
    if prefix is None:
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern[len(prefix) :])
    except re.error as error:
        raise RecipeError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def check_pattern(pattern: str) -> str:
    """Return the pattern if it is usable.

    Raises:
        RecipeError: empty, or an invalid regular expression.
    """
    if not pattern or pattern in (REGEX, SEARCH):
        raise RecipeError(
            "a pattern may not be empty; write a layer name, or a glob such as 'double_blocks.*'"
        )
    _compiled(pattern)
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern names this layer: equal text, or its glob or regular expression
    (case-sensitive).
    """
    if pattern.startswith(SEARCH):
        return _compiled(pattern).search(f"{name}.weight") is not None
    return pattern == name or _compiled(pattern).fullmatch(name) is not None


def looks_like_regex(pattern: str) -> bool:
    """Whether a pattern that is read as a glob was probably meant as a regular expression (FORMATS
    7.5).
    """
    return ".*" in pattern or any(sign in pattern for sign in "\\^$(|")
