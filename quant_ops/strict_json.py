"""JSON that a stranger wrote: everything odd is a ValueError with the reason, and costs no more
than the text is long.
"""

from __future__ import annotations

import json
import reprlib

SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 3, 80, 80, 40
MAX_DEPTH = 64  # of lists and objects; what we read has four levels, and writing recurses


def parse(text: str) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, a key twice in one object, nested too deeply, NaN or Infinity, a
            number too long for Python, or half a surrogate pair, which no UTF-8 can hold. A
            JSONDecodeError where a line and column say more.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check(value)
    return value


def parse_bytes(data: bytes) -> object:
    """`parse` of UTF-8 bytes.

    Raises:
        ValueError: as `parse`; also for what is not UTF-8.
    """
    return parse(data.decode("utf-8"))


def unique(pairs: list[tuple[str, object]]) -> dict:
    """An object whose keys differ.

    Raises:
        ValueError: naming the first key that appears twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {shown(name)} appears twice")
            seen.add(name)
    return result


def refuse_half_characters(text: str) -> None:
    """
    Raises:
        ValueError: half a surrogate pair, which JSON can spell and UTF-8 cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{shown(text)} holds half a character") from None


def shown(value: object) -> str:
    """A value in an error: short, on one line, and without characters that a terminal obeys."""
    return SHORT.repr(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def check(value: object) -> None:
    """Depth and characters of a parsed value.

    Raises:
        ValueError: nested too deeply, or half a surrogate pair.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        below = []
        for item in level:
            if isinstance(item, str):
                refuse_half_characters(item)
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")
