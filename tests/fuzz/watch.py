"""Runs a case with its time and memory watched."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

SECONDS = 1.0  # of this process's own time, which a busy machine does not lengthen
MEGABYTES = 256  # that the process may grow by, at its largest, for an input under 1 MB
SPARE = 1024  # megabytes of addresses beside what a process has: threads and pools take some
STUCK = 120  # seconds after which a process that Python cannot interrupt is given up

Case = Callable[[random.Random], Hashable]


class Hostile(AssertionError):
    """An input that was not handled: case and seed make it again."""


@dataclass
class Hunt:
    """What became of many inputs of one case."""

    inputs: int = 0
    different: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    largest: float = 0.0  # megabytes
    found: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.inputs} inputs, {self.different} of them different, in {self.seconds:.0f} s; "
            f"slowest {self.slowest:.2f} s, most memory {self.largest:.0f} MB; "
            f"{len(self.found)} not handled"
        )


def hunt(case: Case, seeds: Iterable[int], seconds: float = float("inf")) -> Hunt:
    """Every seed, until the time is over."""
    found, seen = Hunt(), set()
    started = time.monotonic()
    with watched():
        for seed in seeds:
            if time.monotonic() - started > seconds:
                break
            found.inputs += 1
            try:
                seen.add(hash(_run(case, seed, found)))
            except Hostile as error:
                found.found.append(str(error))
    found.different, found.seconds = len(seen), time.monotonic() - started
    return found


def run(case: Case, seed: int) -> None:
    """One input.

    Raises:
        Hostile: anything but a good end or an error of ours, or too much time or memory.
    """
    with watched():
        _run(case, seed, Hunt())


def _run(case: Case, seed: int, found: Hunt) -> Hashable:
    where = f"{case.__name__}:{seed}"
    before, started = _fresh_peak(), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    try:
        result = case(random.Random(seed))
    except Exception as error:
        raise Hostile(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, grown = time.process_time() - started, _peak() - before
    found.slowest, found.largest = max(found.slowest, seconds), max(found.largest, grown)
    if seconds > SECONDS:
        raise Hostile(f"{where}: {seconds:.1f} s")
    if grown > MEGABYTES:
        raise Hostile(f"{where}: {grown:.0f} MB more than before")
    return result


def _peak() -> float:
    """Megabytes: the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _fresh_peak() -> float:
    """The same, counted from now on where the system can do that."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """What ends an input that goes on and on, or allocates without touching the memory."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"still at work after {2 * SECONDS} s")

    before = signal.signal(signal.SIGPROF, too_long)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (MEGABYTES + SPARE << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def not_stuck(seconds: float) -> Iterator[None]:
    """End the process, with a traceback, if it is still in here after that."""
    faulthandler.dump_traceback_later(seconds + STUCK, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def add_up(path: Path, name: str, hunted: Hunt) -> None:
    """Add a hunt to those in a JSON file: counts and seconds are summed, the worst is kept."""
    table = json.loads(path.read_text()) if path.exists() else {}
    before = Hunt(**table.get(name, {}))
    table[name] = asdict(
        Hunt(
            inputs=before.inputs + hunted.inputs,
            different=before.different + hunted.different,
            seconds=before.seconds + hunted.seconds,
            slowest=max(before.slowest, hunted.slowest),
            largest=max(before.largest, hunted.largest),
            found=before.found + hunted.found,
        )
    )
    path.write_text(json.dumps(table, indent=2))
