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
MEMORY = re.compile(r"\s*\(?\b(\d+) ?gi?b?\b\)?")
# said beside a card's name, and no part of it
BESIDE = re.compile(
    r"\b(nvidia|geforce|quadro|tesla|laptop|gpu|pcie|sxm\d?|hbm\d?e?|generation|graphics|card"
    r"|blackwell|(workstation|server) edition)\b"
)
# What nobody measured: of another maker, or without units for 8 bit.
OTHERS = {
    r"\b(amd|radeon|instinct|rx ?\d{3,4}|mi\d{2,3}x?)\b": "of AMD",
    r"\b(apple|mps|m[1-9]( (pro|max|ultra))?)\b": "of Apple",
    r"\b(intel|arc|iris|xpu)\b": "of Intel",
    r"\b(gtx|gt|v100|[pmk]\d{1,3}0?|titan (v|xp?))\b": "without tensor cores for 8 bit",
    r"\b(cpu|none)\b": "no GPU",
}


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

    Without a size the first that the table has under the name is meant, of a laptop's the smallest.

    Raises:
        RecipeError: no such card, not with this memory, or one that nothing is known of.
    """
    lower = re.sub(r"[-_,]", " ", text.lower())
    spoken = BESIDE.sub("", lower).strip()
    size = MEMORY.search(spoken)
    plain = _letters(MEMORY.sub("", spoken))
    cards = _table()["cards"]
    named = {_letters(name.lower()): name for name in cards}
    name = named.get(plain) or named.get(f"rtx{plain}")
    if name is None:
        _refuse_others(text, lower)
        raise RecipeError(f"unknown GPU {text!r}; known: {', '.join(_alike(text))}")
    sizes = cards[name]["gb"]
    if size and int(size[1]) not in sizes:
        known = ", ".join(f"{each} GB" for each in sizes)
        raise RecipeError(f"unknown GPU {text!r}: {name} has {known}")
    gb = sizes[0]
    if size:
        gb = int(size[1])
    elif "laptop" in lower:
        gb = min(sizes)
    return Card(_gpu(name, capability(cards[name]["capability"])), gb * GB)


def _refuse_others(text: str, lower: str) -> None:
    for pattern, what in OTHERS.items():
        if re.search(pattern, lower):
            raise RecipeError(
                f"no advice for {text!r}, {what}: speeds and kernels are known of NVIDIA's GPUs "
                "from Turing on; without a GPU the advice goes by size and quality"
            )


def card_here() -> Card | None:
    """The first GPU of NVIDIA that torch sees; None where it sees none."""
    if not torch.cuda.is_available() or torch.version.hip:
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
