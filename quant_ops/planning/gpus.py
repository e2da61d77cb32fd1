"""GPUs that advice is given for: the one in this machine, or one by the name people know."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from ...kernels.device import CLASSES, Gpu, gpu_at
from ..errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

TABLE = Path(__file__).with_name("gpus.toml")
GB = 10**9
MEMORY = re.compile(r"\s*\(?(\d+) ?gi?b\)?$")
MAKERS = re.compile(r"\b(nvidia|geforce|quadro|laptop|gpu)\b")


@dataclass(frozen=True)
class Card:
    """A GPU with its memory in bytes.

    Named ones have the vendor's gigabytes as 10^9 bytes, a few percent less than the driver says.
    """

    gpu: Gpu
    memory: int

    @property
    def name(self) -> str:
        return self.gpu.name

    @property
    def label(self) -> str:
        """`RTX 3060, 12 GB`."""
        return f"{self.name}, {self.memory / GB:.0f} GB"

    def multiplies(self, since: str) -> bool:
        """Whether its compute capability is at least this one."""
        return self.gpu.capability >= capability(since)


def capability(text: str) -> tuple[int, int]:
    """`"8.6"` -> (8, 6)."""
    major, minor = map(int, text.split("."))
    return major, minor


@dataclass(frozen=True)
class Unit:
    """What tensor cores multiply, from a compute capability on; `rate` is the data sheets', x 16
    bit.
    """

    name: str
    since: str
    rate: int

    @property
    def spoken(self) -> str:
        """`INT8`, `NVFP4`."""
        return self.name.upper()


@cache
def units() -> dict[str, Unit]:
    """Everything that tensor cores multiply beside 16 bit, by name."""
    return {name: Unit(name, **facts) for name, facts in _table()["units"].items()}


@cache
def card_names() -> tuple[str, ...]:
    """Every card of the table, with its memory where there are several sizes."""
    names = []
    for name, facts in _table()["cards"].items():
        sizes = facts["gb"]
        names += [name] if len(sizes) == 1 else [f"{name} {size}GB" for size in sizes]
    return tuple(names)


def find_card(text: str) -> Card:
    """A card of the table: `RTX 3060 12GB`, `rtx 3060`, `NVIDIA GeForce RTX 4090`.

    Without a size the first that the table has under the name is meant.

    Raises:
        RecipeError: no such card, or not with this memory.
    """
    spoken = MAKERS.sub("", text.lower()).strip()
    size = MEMORY.search(spoken)
    plain = _letters(MEMORY.sub("", spoken))
    cards = _table()["cards"]
    named = {_letters(name.lower()): name for name in cards}
    name = named.get(plain) or named.get(f"rtx{plain}")
    if name is None:
        raise RecipeError(f"unknown GPU {text!r}; known: {', '.join(_alike(text))}")
    sizes = cards[name]["gb"]
    if size and int(size[1]) not in sizes:
        known = ", ".join(f"{each} GB" for each in sizes)
        raise RecipeError(f"unknown GPU {text!r}: {name} has {known}")
    gb = int(size[1]) if size else sizes[0]
    return Card(_gpu(name, capability(cards[name]["capability"])), gb * GB)


def card_here() -> Card | None:
    """The first GPU that torch sees; None where it sees none."""
    if not torch.cuda.is_available():
        return None
    return Card(gpu_at(0), torch.cuda.get_device_properties(0).total_memory)


def _gpu(name: str, capable: tuple[int, int]) -> Gpu:
    """The card in the class that is asked about where it is not here: the last one before it."""
    alike = max(
        (gpu for gpu in CLASSES.values() if gpu.capability <= capable),
        key=lambda gpu: gpu.capability,
    )
    return replace(alike, name=name, capability=capable)


def _alike(text: str) -> tuple[str, ...]:
    """The cards whose number is in the text; all where none is."""
    numbers = re.findall(r"\d+", MEMORY.sub("", text.lower()))
    found = [name for name in card_names() if set(numbers) & set(name.split())]
    return tuple(found) or card_names()


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text)


@cache
def _table() -> dict:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
