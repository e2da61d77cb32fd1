"""What a model is fitted to: a size of its file, a share of the GPU's memory, or an error."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import RecipeError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(%|[a-z]*)", re.IGNORECASE)
# Of a GPU's memory, left to activations and to the system. An allowance, not a measurement: both
# depend on the size of the picture.
FOR_THE_REST = 0.2


@dataclass(frozen=True)
class Goal:
    """At most `bytes` for the file, or at most `error` for its weights; one of the two.

    `error` is that of `rel_l2`, or of the layers' outputs with a calibration. `said` is how it was
    put, for people.
    """

    said: str
    bytes: int | None = None
    error: float | None = None


def size_goal(text: str, whole: int) -> Goal:
    """`6GB`, `5.5 GiB`, or a share of the whole as `40%`.

    Raises:
        RecipeError: not a size.
    """
    return Goal(f"a file of at most {text.strip()}", bytes=_bytes(text, whole))


def memory_goal(text: str, whole: int) -> Goal:
    """The memory of a GPU as `size_goal` reads it; a part is left to what is not weights.

    Raises:
        RecipeError: not a size.
    """
    return Goal(
        f"weights in {1 - FOR_THE_REST:.0%} of {text.strip()} of memory, the rest for activations",
        bytes=int((1 - FOR_THE_REST) * _bytes(text, whole)),
    )


def error_goal(text: str) -> Goal:
    """`0.02`, or `2%`.

    Raises:
        RecipeError: not a number from 0 to 1.
    """
    number = text.strip().removesuffix("%")
    try:
        error = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        error = -1.0
    if not 0 <= error <= 1:
        raise RecipeError(f"an error to fit to is a number from 0 to 1, or in %: got {text!r}")
    return Goal(f"an error of at most {error:g}", error=error)


def _bytes(text: str, whole: int) -> int:
    found = SIZE.fullmatch(text.strip())
    unit = found and found[2].lower()
    if found is None or (unit != "%" and unit not in UNITS):
        raise RecipeError(
            "a size to fit to is a number with a unit, as 6GB, 900 MB, 5.5 GiB or 40%: got "
            f"{text!r}"
        )
    each = whole / 100 if unit == "%" else UNITS[unit]
    size = int(float(found[1]) * each)
    if size <= 0:
        raise RecipeError(f"a size to fit to is more than nothing: got {text!r}")
    return size
