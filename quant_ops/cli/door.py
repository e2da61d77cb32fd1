"""What both commands do around their work: refusals in one line, signals, a reader that goes away,
text that a terminal does not obey. Imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import QuantError, visible

REFUSED, INTERRUPTED, SIGNALLED = 2, 130, 128
# What torch says, in a RuntimeError or one of its own, where a device or the system has no more.
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

# The flag of each setting that an error names.
FLAGS = {
    "assume": "--assume nf4 or --assume fp4",
    "assume_convrot": "--assume-convrot",
    "assume_nvfp4": "--assume",
    "hp_filter": "--hp-filter",
    "nibble_order": "--nibble-order low or --nibble-order high",
    "overwrite": "--overwrite",
    "shapes": "--shapes-from ORIGINAL",
}


class Ended(BaseException):
    """The system asks the process to end: clean up, say so, go."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run_command(name: str, work: Callable[[], int | None]) -> int:
    """Run a command; returns its exit status: what `work` says, 2 refused, 130 interrupted, 128 + n
    ended by signal n.
    """
    try:
        with _signals():
            try:
                return work() or 0
            finally:  # also on the way out of --help
                sys.stdout.flush()
    except QuantError as error:
        return _leave(name, with_flag(error), REFUSED)
    except KeyboardInterrupt:
        return _leave(name, "interrupted; nothing was written", INTERRUPTED)
    except Ended as end:
        number = signal.Signals(end.number)
        return _leave(name, f"ended by {number.name}; nothing was written", SIGNALLED + number)
    except BrokenPipeError:  # `fewbits ... | head`; the output file, if any, is complete
        # the interpreter flushes once more while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGNALLED + getattr(signal, "SIGPIPE", 13)
    except (MemoryError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if not isinstance(error, MemoryError) and not any(sign in reason for sign in NO_MEMORY):
            raise
        advice = "close other programs, or convert on another device"
        return _leave(
            name, f"out of memory: {reason or 'the system has none left'}; {advice}", REFUSED
        )


def with_flag(error: QuantError) -> str:
    """The error's text, and the flag that answers it."""
    flag = FLAGS.get(error.option)
    if flag:
        return f"{error} ({flag})"
    return str(error)


def say(*lines: str) -> None:
    """Print lines; characters that a terminal obeys are spelled out."""
    print("\n".join(map(visible, "\n".join(lines).split("\n"))))


def warn(text: str) -> None:
    """One line on stderr."""
    print(visible(text), file=sys.stderr)


def _leave(name: str, message: str, status: int) -> int:
    warn(f"{name}: {message}")
    return status


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, once; what is ignored (nohup) stays so."""
    before = {}

    def end(number: int, frame: object) -> None:
        for other in before:  # what is cleaned up now is not interrupted
            signal.signal(other, signal.SIG_IGN)
        raise Ended(number)

    try:
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    except ValueError:  # not the main thread: whoever runs it decides
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
