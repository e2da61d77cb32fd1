"""What is known of each way to quantize a whole model: quality, speed, and what multiplies it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import RecipeError
from ..files import read_text
from ..formats import get_format
from ..report.words import seen_at
from ..strict_json import parse
from .gpus import Card, Unit, units
from .wish import Wish, parse_wish

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

TABLE = Path(__file__).with_name("advice.toml")
FASTER, SLOWER = 1.05, 0.95  # x 16 bit: between them nobody notices


@dataclass(frozen=True)
class Known:
    """One line of advice.toml.

    `ssim` and `cosine` are those of the emoji model; `speeds` are times as fast as 16 bit, by class
    of GPU. `unit` multiplies it in comfy-kitchen, from the compute capability `since` on; `kernel`
    names its codes for a faster product of FewBits.
    """

    wish: Wish
    ssim: float
    cosine: float
    speeds: Mapping[str, float]
    unit: Unit | None = None
    since: str = ""
    kernel: str | None = None

    @property
    def quality(self) -> int:
        """0 is hard to tell from the original, 1 has other details, 2 is visibly different."""
        return seen_at(self.ssim)[0]

    @property
    def seen(self) -> str:
        """What pictures of this SSIM look like, in words."""
        return seen_at(self.ssim)[1]

    def has_unit(self, card: Card) -> bool:
        """Whether comfy-kitchen multiplies its codes by units of the card."""
        return self.unit is not None and card.multiplies(self.since)


@dataclass(frozen=True)
class Speed:
    """Measured on this class of GPU, or not: then `ratio` is None."""

    ratio: float | None
    where: str

    @property
    def text(self) -> str:
        if self.ratio is None:
            return f"not measured on {self.where}"
        words = {0: "faster than 16 bit", 1: "as fast as 16 bit", 2: "slower than 16 bit"}
        return f"{words[self.pace]} ({self.ratio:.2f} x, measured on {self.where})"

    @property
    def pace(self) -> int | None:
        """0 is faster than 16 bit, 1 the same, 2 slower; None where nobody measured."""
        if self.ratio is None:
            return None
        if self.ratio >= FASTER:
            return 0
        return 1 + (self.ratio < SLOWER)


@dataclass(frozen=True)
class Bench:
    """What `fewbits bench` measured on a GPU: format -> times as fast as 16 bit."""

    device: str
    ratios: Mapping[str, float]

    def speed(self, wish: Wish) -> Speed:
        """Of a format with its default options; a method changes no speed."""
        default = wish.options == get_format(wish.format).configure({})
        return Speed(self.ratios.get(wish.format) if default else None, self.device)


@cache
def known_ways() -> tuple[Known, ...]:
    """Every way to quantize a whole model that advice is given about."""
    return tuple(_known(text, facts) for text, facts in _table()["formats"].items())


def _known(text: str, facts: dict) -> Known:
    unit = units()[facts["unit"]] if "unit" in facts else None
    return Known(
        wish=parse_wish(text),
        ssim=facts["ssim"],
        cosine=facts["cosine"],
        speeds=facts.get("speed", {}),
        unit=unit,
        since=facts.get("since", unit.since if unit else ""),
        kernel=facts.get("kernel"),
    )


def read_bench(path: Path) -> Bench:
    """What `fewbits bench --json` printed; of each format the most rows of x count.

    Raises:
        RecipeError: some other file.
    """
    try:
        data = parse(read_text(path, RecipeError))
        rows = sorted(data["linears"], key=lambda row: row["M"])
        ratios = {row["format"]: row["bf16_ms"] / row["ms"] for row in rows}
        return Bench(str(data["device"]), ratios)
    except (ValueError, TypeError, KeyError, ArithmeticError):
        raise RecipeError(f"{path.name}: not what `fewbits bench --json` prints") from None


def oldest_comfyui() -> str:
    """The first ComfyUI in which FewBits runs."""
    return _table()["oldest_comfyui"]


@cache
def _table() -> dict:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
