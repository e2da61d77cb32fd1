"""How far the tensors of one file are from those of another, both decoded: JSON, text from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..errors import visible
from ..options import as_json
from .report import megabytes

WORST = 10  # tensors named in the text
OUTLIER = 8.0  # x the median error of layers: what is rounded alike differs less
# Error of a tensor that no rounding has: where most tensors are the same, one with more is named.
GARBLED = 0.5
# Of a broken tensor and its original: above, it was scaled; below, it is not made from it.
ALIKE, UNLIKE = 0.99, 0.5
LISTED = 5  # layers named that differ far more than the others
CHUNK = 1 << 20  # elements in float64 at a time: 8 MB for each operand


@dataclass(frozen=True)
class Sums:
    """Over all elements of a and b that are finite in both, in float64.

    `unlike` counts the others, where one is NaN or infinite and the other is not the same.
    """

    elements: int = 0
    error: float = 0.0  # (b - a)^2
    signal: float = 0.0  # a^2
    other: float = 0.0  # b^2
    product: float = 0.0  # a b
    largest: float = 0.0  # |b - a|
    unlike: int = 0

    def __add__(self, more: Sums) -> Sums:
        return Sums(
            elements=self.elements + more.elements,
            error=self.error + more.error,
            signal=self.signal + more.signal,
            other=self.other + more.other,
            product=self.product + more.product,
            largest=max(self.largest, more.largest),
            unlike=self.unlike + more.unlike,
        )

    @property
    def rel_l2(self) -> float:
        """||b - a|| / ||a||; infinite where only b is not zero."""
        if self.error == 0:
            return 0.0
        if self.signal:
            return math.sqrt(self.error / self.signal)
        return math.inf

    @property
    def sqnr_db(self) -> float | None:
        """Signal to error in dB; None when there is no error or no signal."""
        if self.error and self.signal:
            return 10 * math.log10(self.signal / self.error)
        return None

    @property
    def cosine(self) -> float | None:
        """Of the angle between a and b; None when either is zero."""
        norms = math.sqrt(self.signal) * math.sqrt(self.other)
        if norms:
            return self.product / norms
        return None

    def to_json(self) -> dict:
        rel_l2 = None
        if math.isfinite(self.rel_l2):
            rel_l2 = self.rel_l2
        return {
            "elements": self.elements,
            "rel_l2": rel_l2,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
            "largest_error": self.largest,
            "unlike": self.unlike,
        }


def measure(a: torch.Tensor, b: torch.Tensor) -> Sums:
    """Sums over two tensors of equal shape and any real dtypes, a chunk at a time."""
    total = Sums()
    flat = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat[0].numel(), CHUNK):
        total += _sums(*(part[start : start + CHUNK].double() for part in flat))
    return total


def _sums(a: torch.Tensor, b: torch.Tensor) -> Sums:
    elements, unlike = a.numel(), 0
    finite = a.isfinite() & b.isfinite()
    if not bool(finite.all()):
        same = (a == b) | (a.isnan() & b.isnan())
        unlike = int((~finite & ~same).sum())
        a, b = a[finite], b[finite]
    difference = b - a
    largest = 0.0
    if a.numel():
        largest = float(difference.abs().max())
    return Sums(
        elements=elements,
        error=float(difference @ difference),
        signal=float(a @ a),
        other=float(b @ b),
        product=float(a @ b),
        largest=largest,
        unlike=unlike,
    )


def suspects(layers: dict[str, float]) -> list[str]:
    """Layers whose weights differ far more than the others do; infinite is a weight with NaN."""
    errors = [error for error in layers.values() if error > 0]
    if not errors:
        return []
    limit = OUTLIER * statistics.median(errors)
    mostly_same = 2 * len(errors) < len(layers)
    if mostly_same:
        limit = min(limit, GARBLED)
    found = [name for name, error in layers.items() if not error <= limit]
    return sorted(found, key=lambda name: -layers[name])[:LISTED]


def block_of(layer: str) -> str:
    """`double_blocks.3.attn.qkv` -> `double_blocks.3`; the name itself without a number."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if numbers:
        return ".".join(parts[: numbers[0] + 1])
    return layer


@dataclass(frozen=True)
class Difference:
    """One tensor of both files; `formats` says how each has it: format, dialect or dtype."""

    name: str
    formats: tuple[str, str]
    sums: Sums

    @property
    def identical(self) -> bool:
        return self.sums.error == 0 and self.sums.unlike == 0

    @property
    def is_weight(self) -> bool:
        return self.name.endswith(".weight")

    @property
    def extent(self) -> float:
        """The relative error, infinite where one file has a number that the other lacks."""
        if self.sums.unlike:
            return math.inf
        return self.sums.rel_l2

    @property
    def what_is_wrong(self) -> str:
        """Of a tensor that differs far more than others: what the numbers look like."""
        if self.sums.unlike:
            return f"is broken: {self.sums.unlike} elements are NaN or infinite in one file only"
        return f"differs more than {OUTLIER:.0f} x as much as the median layer: {self._looks_like}"

    @property
    def _looks_like(self) -> str:
        sums = self.sums
        if not sums.other:
            return "the second file has only zeros there"
        if not sums.signal:
            return "the first file has only zeros there"
        if sums.cosine > ALIKE:
            return f"it is {math.sqrt(sums.other / sums.signal):.3g} x as large"
        if sums.cosine < UNLIKE:
            return f"it is another weight, or garbled (cosine {sums.cosine:.2f})"
        return "broken, or rounded far more"

    @property
    def rank(self) -> tuple[int, float]:
        """Larger is worse: elements that no number measures come before all errors."""
        return self.sums.unlike, self.sums.rel_l2

    def to_json(self) -> dict:
        first, second = self.formats
        return {"name": self.name, "first": first, "second": second, **self.sums.to_json()}


@dataclass(frozen=True)
class Comparison:
    """Two files: the tensors of both, and what only one has. `reshaped` has a line per tensor whose
    shapes differ.
    """

    names: tuple[str, str]
    bytes: tuple[int, int]
    differences: tuple[Difference, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    reshaped: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether both hold the same tensors with the same values, however they are stored."""
        alike = all(difference.identical for difference in self.differences)
        return alike and not any(self.only) and not self.reshaped

    def worst(self) -> list[Difference]:
        """Tensors that differ, the worst first."""
        found = [difference for difference in self.differences if not difference.identical]
        return sorted(found, key=lambda difference: difference.rank, reverse=True)

    def suspects(self) -> list[str]:
        """Tensors that differ far more than the others do: broken, or rounded far more."""
        weights = {each.name: each.extent for each in self.differences if each.is_weight}
        others = {each.name: each.extent for each in self.differences if not each.is_weight}
        return [*suspects(weights), *suspects(others)]

    def totals(self) -> dict[tuple[str, str], tuple[int, Sums]]:
        """Formats of both files -> (tensors, sums over them)."""
        found: dict[tuple[str, str], tuple[int, Sums]] = {}
        for difference in self.differences:
            count, sums = found.get(difference.formats, (0, Sums()))
            found[difference.formats] = count + 1, sums + difference.sums
        return found

    def to_json(self) -> dict:
        total = sum((difference.sums for difference in self.differences), Sums())
        rows = [
            {"first": formats[0], "second": formats[1], "tensors": count, **sums.to_json()}
            for formats, (count, sums) in self.totals().items()
        ]
        return {
            "first": {"name": self.names[0], "bytes": self.bytes[0], "only": self.only[0]},
            "second": {"name": self.names[1], "bytes": self.bytes[1], "only": self.only[1]},
            "identical": self.identical,
            "total": total.to_json(),
            "formats": rows,
            "suspects": self.suspects(),
            "tensors": as_json(self.worst()),
            "reshaped": self.reshaped,
        }

    def to_text(self) -> str:
        """A few lines for a terminal: sizes, totals by formats, worst tensors, what is missing."""
        return "\n".join(map(visible, self._lines()))

    def _lines(self) -> Iterator[str]:
        for name, size in zip(self.names, self.bytes, strict=True):
            yield f"{name}: {megabytes(size)}"
        same = sum(difference.identical for difference in self.differences)
        yield f"{len(self.differences)} tensors in both, {same} of them with the same values"
        if self.identical:
            yield "identical"
            return
        yield f"{'stored as':<44} {'tensors':>7} {'rel_l2':>8} {'SQNR':>9} {'cosine':>9}"
        for formats, (count, sums) in self.totals().items():
            yield f"{' -> '.join(formats):<44} {count:>7} {_numbers(sums)}"
        by_name = {each.name: each for each in self.differences}
        for name in self.suspects():
            layer = name.removesuffix(".weight")
            yield f"layer {layer} in block {block_of(layer)} {by_name[name].what_is_wrong}"
        worst = self.worst()[:WORST]
        if worst:
            yield "largest differences:"
        for difference in worst:
            sums = difference.sums
            line = f"  {_numbers(sums)}  {difference.name}, at most {sums.largest:.3g}"
            if sums.unlike:
                line += f", {sums.unlike} elements not finite in one"
            yield line
        for name, missing in zip(self.names, self.only, strict=True):
            yield from _listed(f"only in {name}", missing)
        yield from _listed("of different shapes", self.reshaped)


def _numbers(sums: Sums) -> str:
    decibels, cosine = "-", "-"
    if sums.sqnr_db is not None:
        decibels = f"{sums.sqnr_db:.1f} dB"
    if sums.cosine is not None:
        cosine = f"{sums.cosine:.6f}"
    return f"{sums.rel_l2:>8.4f} {decibels:>9} {cosine:>9}"


def _listed(what: str, names: Iterable[str]) -> Iterator[str]:
    names = list(names)
    if names:
        line = f"{what}: {', '.join(names[:WORST])}"
        if len(names) > WORST:
            line += f", and {len(names) - WORST} more"
        yield line
