"""A progress bar on a terminal's stderr, as a progress callback."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..errors import visible
from ..pipeline import ProgressFn

# Columns of the bar itself, bytes, seconds and speed; the layer's name takes what a terminal has
# beyond them. At 80 columns a whole name left one for the bar.
FACTS = 68


def columns() -> int:
    return shutil.get_terminal_size().columns


def end_of(name: str, room: int) -> str:
    """The end of a name tells a layer from its neighbours; nothing where there is no room."""
    if len(name) <= room:
        return name
    if room > 1:
        return f"…{name[len(name) - room + 1 :]}"
    return ""


@contextmanager
def progress_bar(hidden: bool) -> Iterator[ProgressFn]:
    """Bytes, bytes per second, time left and the layer's name; nothing when hidden or not on a
    terminal.
    """
    disable = hidden or not sys.stderr.isatty()
    made = tqdm(unit="B", unit_scale=True, disable=disable, file=sys.stderr, dynamic_ncols=True)
    with made as bar:

        def show(done: int, total: int, layer: str) -> None:
            bar.total = total
            bar.set_postfix_str(end_of(visible(layer), columns() - FACTS), refresh=False)
            bar.update(done - bar.n)

        yield show
