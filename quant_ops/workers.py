"""Where the layers of a conversion are computed: one after the other here, or two at a time in
threads of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Any, Protocol

import torch

# Layers at a time on a CPU; more would only hold more of them in memory. Seconds for 1.8 GB on two
# cores that other work kept half busy, one layer on two threads -> two layers on one thread each:
# int8 row 4.6, 11.9, 16.5 -> 3.2, 3.0, 3.4; fp8 4.0, 14.3, 18.2 -> 3.8, 5.6, 9.3. Threads inside a
# layer wait for each other: one that loses its core stops both.
LAYERS = 2
POLL_SECONDS = 0.1  # how often a waiting caller is asked whether to go on

Step = Callable[[], None]


class Workers(Protocol):
    """Runs `task(step)`; `step` is called between the steps of the task and may raise to end it."""

    at_once: int

    def submit(self, task: Callable[[Step], Any], ask: Step) -> Any:
        """Start a task; the handle goes to `result`."""

    def result(self, handle: Any, ask: Step) -> Any:
        """Wait for a task; `ask` is called meanwhile, in this thread, and what it raises ends the
        wait.
        """


class Here:
    """One task at a time, in the caller's thread, with all of torch's threads."""

    at_once = 1

    def submit(self, task: Callable[[Step], Any], ask: Step) -> Any:
        ask()
        return task(ask)

    def result(self, handle: Any, ask: Step) -> Any:
        return handle


class Threads:
    """`LAYERS` tasks at a time, torch's threads divided among them.

    Passes over a weight in cache-sized chunks leave little to each thread, and every pass would
    wait for the slowest.
    """

    at_once = LAYERS

    def __init__(self, pool: ThreadPoolExecutor, run: Callable, cancelled: Event):
        self._pool = pool
        self._run = run
        self._cancelled = cancelled

    def submit(self, task: Callable[[Step], Any], ask: Step) -> Future:
        ask()
        return self._pool.submit(self._run, task, self._go_on)

    def result(self, handle: Future, ask: Step) -> Any:
        while not wait([handle], POLL_SECONDS).done:
            ask()
        return handle.result()

    def _go_on(self) -> None:
        if self._cancelled.is_set():
            raise InterruptedError("the conversion was cancelled")


@contextlib.contextmanager
def workers(parallel: bool) -> Iterator[Workers]:
    """Workers for one conversion; leaving ends what still runs at its next step and restores
    torch's threads.
    """
    before = torch.get_num_threads()
    if not parallel or before < LAYERS:
        yield Here()
        return
    inference = torch.is_inference_mode_enabled()  # belongs to the thread

    def prepare() -> None:
        # of this thread; new threads elsewhere see it until it is set back
        torch.set_num_threads(before // LAYERS)

    def run(task: Callable[[Step], Any], step: Step) -> Any:
        with torch.inference_mode(inference):
            return task(step)

    cancelled = Event()
    pool = ThreadPoolExecutor(LAYERS, "fewbits-layer", initializer=prepare)
    try:
        yield Threads(pool, run, cancelled)
    finally:
        cancelled.set()
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
