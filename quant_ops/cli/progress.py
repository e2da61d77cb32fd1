"""A progress bar on a terminal's stderr, as a progress callback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ..errors import visible
from ..pipeline import ProgressFn


@contextmanager
def progress_bar(hidden: bool) -> Iterator[ProgressFn]:
    """Bytes, bytes per second, time left and the layer's name; nothing when hidden or not on a
    terminal.
    """
    with tqdm(
        unit="B", unit_scale=True, disable=hidden or not sys.stderr.isatty(), file=sys.stderr
    ) as bar:

        def show(done: int, total: int, layer: str) -> None:
            bar.total = total
            bar.set_postfix_str(visible(layer), refresh=False)
            bar.update(done - bar.n)

        yield show
