r"""Patterns on layer names: exact, glob, parts of a name, or a regular expression after a prefix.

- `img_in`, `double_blocks.*.proj`: the whole base name; `fnmatch` syntax, `*` crosses dots.
- `part:*norm*`: a glob for any one part of the name between its dots, in any case.
- `top:*_in`: the same for layers outside numbered blocks: `model.txt_in.0`, but not
  `blocks.0.proj_in`.
- `re:...`: must match the whole base name.
- `search:...`: may match anywhere in the full key (`<base>.weight`), which is what the classic
  command's `--custom-layers` and `--exclude-layers` do.

Whatever a user writes is matched in time linear in the name: regular expressions by RE2, globs by
`fnmatch`, whose stars never backtrack. A server waits for a match: it is no matter of taste.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from ..errors import RecipeError, visible

try:
    import re2
except ImportError:  # it is in requirements.txt; all but regular expressions works without it
    re2 = None

REGEX, SEARCH, PART, TOP = "re:", "search:", "part:", "top:"
PREFIXES = (REGEX, SEARCH, PART, TOP)
GLOB_SIGNS = frozenset("*?[")
# An alternative of 100 full layer names fits.
LONGEST = 4000
# Bytes of one compiled expression. The slowest found, (?:.?.?.?)* 300 times, takes 42 ms for a name
# of 255 characters; a list of 100 full layer names fits and takes .1 ms.
REGEX_MEMORY = 256 << 10
SHOWN = 60  # characters of a pattern in an error
LINEAR = (
    "regular expressions here are those of RE2, which always end in linear time: no look-around, "
    "no back-references, no possessive or atomic groups"
)


class Regex:
    """A regular expression that cannot take more than linear time.

    Raises:
        RecipeError: too long, not a regular expression, or one that RE2 does not support; `where`
            names it in the message.
    """

    def __init__(self, text: str, where: str = ""):
        where = where or f"pattern {shortened(REGEX + text)!r}"
        if len(text) > LONGEST:
            raise RecipeError(f"{where} has {len(text)} characters, allowed are {LONGEST}")
        if re2 is None:
            raise RecipeError(
                f"{where} is a regular expression, which needs the package google-re2 "
                "(pip install google-re2); names and globs work without it"
            )
        try:
            self._compiled = re2.compile(text, _options())
        except (re2.error, UnicodeEncodeError) as error:
            raise RecipeError(
                f"{where} is not a regular expression: {_reason(error)}; {LINEAR}"
            ) from None

    def search(self, name: str) -> bool:
        """Whether it matches anywhere in the name."""
        return self._compiled.search(name) is not None

    def fullmatch(self, name: str) -> bool:
        """Whether it matches the whole name."""
        return self._compiled.fullmatch(name) is not None


def check_pattern(pattern: str) -> str:
    """Return the pattern if it is usable.

    Raises:
        RecipeError: empty, too long, or an invalid regular expression.
    """
    if not pattern or pattern in PREFIXES:
        raise RecipeError(
            "a pattern may not be empty; write a layer name, or a glob such as 'double_blocks.*'"
        )
    if len(pattern) > LONGEST + len(SEARCH):
        raise RecipeError(
            f"pattern {shortened(pattern)!r} has {len(pattern)} characters, allowed are {LONGEST}"
        )
    matcher(pattern)
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern names this layer: equal text, or its glob or regular expression
    (case-sensitive, `part:` apart).
    """
    return matcher(pattern)(name)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns names this layer."""
    return any(matches(pattern, name) for pattern in patterns)


@lru_cache(maxsize=8192)
def matcher(pattern: str) -> Callable[[str], bool]:
    """`matches` for one pattern."""
    if pattern.startswith(REGEX):
        return Regex(pattern[len(REGEX) :]).fullmatch
    if pattern.startswith(SEARCH):
        expression = Regex(pattern[len(SEARCH) :], f"pattern {shortened(pattern)!r}")
        return lambda name: expression.search(f"{name}.weight")
    if pattern.startswith(PART):
        part = _glob(pattern[len(PART) :].lower())
        return lambda name: any(map(part.fullmatch, name.lower().split(".")))
    if pattern.startswith(TOP):
        part = _glob(pattern[len(TOP) :].lower())
        return lambda name: (
            not _in_a_block(name) and any(map(part.fullmatch, name.lower().split(".")))
        )
    if is_plain(pattern):
        return pattern.__eq__
    glob = _glob(pattern)
    return lambda name: pattern == name or glob.fullmatch(name) is not None


def is_plain(pattern: str) -> bool:
    """Whether it can match nothing but its own text."""
    return not pattern.startswith(PREFIXES) and GLOB_SIGNS.isdisjoint(pattern)


def closed(glob: str) -> str:
    """The same glob, with every `[` that no `]` follows written as `[[]`.

    Such a bracket is a plain character. Looking for its end again and again is what makes long
    globs slow: 10,000 of them took `fnmatch` 4.6 s.
    """
    end = glob.rfind("]") + 1
    return glob[:end] + glob[end:].replace("[", "[[]")


def looks_like_regex(pattern: str) -> bool:
    """Whether a pattern that is read as a glob was probably meant as a regular expression."""
    return ".*" in pattern or any(sign in pattern for sign in "\\^$(|")


def shortened(text: str) -> str:
    """The text, or its beginning and an ellipsis."""
    if len(text) <= SHOWN:
        return text
    return f"{text[:SHOWN]}..."


def _glob(pattern: str) -> re.Pattern:
    return re.compile(fnmatch.translate(closed(pattern)))


def _in_a_block(name: str) -> bool:
    """Whether a number in the name is followed by a word: `blocks.0.proj`, but not `mlp.0`."""
    parts = name.split(".")
    return any(part.isdigit() and not after.isdigit() for part, after in zip(parts, parts[1:]))


def _options() -> object:
    options = re2.Options()
    options.max_mem = REGEX_MEMORY
    options.never_capture = True
    options.log_errors = False
    return options


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "half a character"
    detail = error.args[0]
    text = detail.decode("utf-8", "replace") if isinstance(detail, bytes) else str(detail)
    return visible(text)
