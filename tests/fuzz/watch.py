"""Runs a case with its time and memory watched."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Callable

SECONDS = 1.0  # of this process's own time, which a busy machine does not lengthen
MEGABYTES = 256  # that the process may grow by, at its largest, for an input under 1 MB

Case = Callable[[random.Random], None]


class Hostile(AssertionError):
    """An input that was not handled: case and seed make it again."""


def peak_megabytes() -> float:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run(case: Case, seed: int) -> None:
    """One input.

    Raises:
        Hostile: anything but a good end or an error of ours, or too much time or memory.
    """
    where = f"{case.__name__} of seed {seed}"
    before, started = peak_megabytes(), time.process_time()
    try:
        case(random.Random(seed))
    except Exception as error:
        raise Hostile(f"{where}: {type(error).__name__}: {error}") from error
    seconds, grown = time.process_time() - started, peak_megabytes() - before
    if seconds > SECONDS:
        raise Hostile(f"{where}: {seconds:.1f} s")
    if grown > MEGABYTES:
        raise Hostile(f"{where}: {grown:.0f} MB more than before")
