"""Starts programs with their libraries imported already: ComfyUI takes 3 s of a core to start then, and 13 s otherwise.

One process imports what every ComfyUI imports, torch above all, and waits. A start is a fork of it that runs a file as
`python FILE` would. ComfyUI's own modules are imported after the fork, from the tree that is started. This file is that
process too: it reads a request a line, answers each with a number, and ends with its input.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

# Forking is safe where no thread runs and no framework of the system forbids it.
POSSIBLE = sys.platform == "linux"
LIBRARIES = (
    "torch._dynamo", "torchvision", "torchaudio", "torchsde", "comfy_kitchen", "transformers", "spandrel", "kornia",
    "scipy.stats", "scipy.integrate", "scipy.ndimage", "scipy.optimize", "einops", "safetensors.torch", "PIL.Image", "av",
    "aiohttp.web", "sqlalchemy.orm", "alembic.command", "pydantic_settings", "huggingface_hub", "yaml", "psutil", "tqdm.auto",
)  # fmt: skip
RUNNING = -1


class Warm:
    """The waiting process, as seen from the one that wants others started."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-s", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )

    def start(self, command: list[str], folder: Path, log: Path) -> Started:
        """Run the file `command[0]` with the other arguments, in `folder`; what it writes goes to `log`."""
        return Started(self, self.ask(command=command, folder=str(folder), log=str(log)))

    def ask(self, **request: object) -> int:
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


class Started:
    """What a `subprocess.Popen` is, as far as it is needed here."""

    def __init__(self, warm: Warm, pid: int):
        self.pid, self.returncode = pid, None
        self._warm = warm

    def poll(self) -> int | None:
        if self.returncode is None:
            status = self._warm.ask(ended=self.pid)
            self.returncode = None if status == RUNNING else os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.returncode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def start(command: list[str], *, environment: dict[str, str], folder: Path, log: Path) -> Started:
    """One waiting process serves all starts in the same environment."""
    return _warm(tuple(sorted(environment.items()))).start(command, folder, log)


@functools.cache
def _warm(environment: tuple[tuple[str, str], ...]) -> Warm:
    return Warm(dict(environment))


def serve() -> str | None:
    """Answer requests until the input ends; in a fork: the file to run, all set for it."""
    del sys.path[0]  # the folder of this file
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy the memory of all that was imported
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            print(status if pid else RUNNING, flush=True)
            continue
        pid = os.fork()
        if not pid:
            return become(**request)
        print(pid, flush=True)
    return None


def become(command: list[str], folder: str, log: str) -> str:
    os.setsid()
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    return command[0]


if __name__ == "__main__":
    if program := serve():
        runpy.run_path(program, run_name="__main__")
