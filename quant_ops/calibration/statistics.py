"""Running statistics of one input of a model: a bounded memory of the rows that layers were given.

Where K is small the mean of x^T x itself is kept; else rows of x, thinned out evenly as more come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from ..methods.inputs import Inputs

# Of the trace, which no eigenvalue exceeds: what float32 sums leave uncertain. A hundredth of the
# mean diagonal is the least that methods add themselves, for K up to 10,000 this is less.
RELATIVE_JITTER = 1e-6


# Rows of one call that are looked at; more stand in for their neighbours. An image of 1024 x 1024
# pixels has 4,096, and reading all of them is what watching would cost.
ROWS_LOOKED_AT = 512
# Calls of which each half looks at all, where it keeps a gram; then at every other one, at every
# fourth from twice as many on, and so forth. Rows are thinned out by what memory they take.
CALLS_LOOKED_AT = 64
# Elements of an input that wait for each other: adding them up takes as many launches as one.
WAITING = 1 << 21
# Spreads the rows that are taken of one call over the places that they can have.
PRIME = 7919


@dataclass
class Half:
    """One half of what was seen. `gram` (K, K) float32 is the sum of x^T x where it is kept; else
    `rows` are bfloat16 rows, one batch a call. Of the calls every `stride`-th is looked at, and
    stands for the others; `count` are rows, those included. `lost` of them held NaN or Inf, on the
    model's device, until `settle`.
    """

    count: int = 0
    gram: torch.Tensor | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    calls: int = 0
    stride: int = 1
    lost: torch.Tensor | None = None

    @property
    def held(self) -> int:
        return sum(len(batch) for batch in self.rows)

    def looks(self) -> bool:
        """A call comes: whether to look at it."""
        self.calls += 1
        return self.calls % self.stride == 0

    def take(self, batches: list[torch.Tensor], capacity: int) -> None:
        """Keep batches; while there are too many rows, every other batch goes."""
        self.rows += batches
        while self.held > capacity and len(self.rows) > 1:
            self.rows = self.rows[1::2]
            self.stride *= 2


@dataclass(frozen=True)
class _Waiting:
    """Rows that are not added up yet, each for `weight` of those that were seen."""

    part: Half
    rows: torch.Tensor
    weight: int


@dataclass(frozen=True)
class _Kept:
    """Some rows of a call, each for `weight` of those that were seen, and the largest magnitude of
    each channel over more rows of it, (K,); on the model's device.
    """

    part: Half
    rows: torch.Tensor
    weight: int
    largest: torch.Tensor


@dataclass
class InputStatistics:
    """What is known of one input (rows, K).

    Args:
        size: K.
        capacity: rows that each half may keep; from 2 K on, the gram, as large, is kept instead.

    `total`, `square` and `largest` are sums of x and x^2 and the maximum of |x| by channel, float32
    of shape (K,); None before anything was seen. Rows with NaN or Inf are left out and counted in
    `damaged`.
    """

    size: int
    capacity: int
    total: torch.Tensor | None = None
    square: torch.Tensor | None = None
    largest: torch.Tensor | None = None
    damaged: int = 0
    halves: tuple[Half, Half] = field(default_factory=lambda: (Half(), Half()))
    _waiting: list[_Waiting] = field(default_factory=list, repr=False)
    _kept: list[_Kept] = field(default_factory=list, repr=False)

    @property
    def exact(self) -> bool:
        """Whether the gram is kept, and not rows."""
        return self.capacity >= 2 * self.size  # float32 against bfloat16

    def allow(self, capacity: int) -> None:
        """Each half may keep more rows from now on; what began with rows goes on with rows."""
        if not self.exact:
            self.capacity = max(self.capacity, min(capacity, 2 * self.size - 1))

    @property
    def count(self) -> int:
        return sum(half.count for half in self.halves)

    def add(self, x: torch.Tensor, half: int, each: int, seed: int) -> bool:
        """Take in the rows of one call, or let it pass. Nothing here waits for a GPU.

        Args:
            x: (..., K) of any float dtype, on any device; not changed.
            half: 0 or 1: the part of the calibration it belongs to.
            each: rows of one call that may be kept, evenly spread, from a place by `seed`.

        Returns:
            Whether it was looked at.
        """
        part, rows = self.halves[half], x.detach().reshape(-1, self.size)
        if not len(rows) or not part.looks():
            return False
        step = max(len(rows) // ROWS_LOOKED_AT, 1)
        rows = rows[part.calls % step :: step]
        weight = step * part.stride
        part.count += len(rows) * weight
        if self.exact:
            if part.calls >= CALLS_LOOKED_AT * part.stride:
                part.stride *= 2
            self._waiting.append(_Waiting(part, rows.clone(), weight))
            if sum(waiting.rows.numel() for waiting in self._waiting) >= WAITING:
                self._add_up()
            return True
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=0)
        apart = max(len(rows) // each, 1)
        kept = rows[(part.calls * PRIME + seed) % apart :: apart][:each].clone()
        self._kept.append(_Kept(part, kept, weight * len(rows) // len(kept), largest))
        return True

    def _add_up(self) -> None:
        """What waits, by its half and weight."""
        halves: tuple[dict[int, list[torch.Tensor]], ...] = ({}, {})
        for waiting in self._waiting:
            by_weight = halves[waiting.part is self.halves[1]]
            by_weight.setdefault(waiting.weight, []).append(waiting.rows)
        self._waiting = []
        for part, by_weight in zip(self.halves, halves, strict=True):
            for weight, rows in by_weight.items():
                self._add_rows(part, torch.cat(rows), weight)

    def _add_rows(self, part: Half, rows: torch.Tensor, weight: int) -> None:
        sound = torch.linalg.vector_norm(rows, torch.inf, dim=1).isfinite()
        lost = (~sound).sum() * weight
        part.lost = lost if part.lost is None else part.lost.to(lost.device) + lost
        wide = torch.where(sound[:, None], rows, 0.0).float()
        largest = torch.linalg.vector_norm(wide, torch.inf, dim=0)
        gram = (wide.T @ wide).mul_(weight)
        square, total = gram.diagonal().clone(), wide.sum(0).mul_(weight)
        part.gram = gram if part.gram is None else gram + part.gram.to(gram.device)
        if self.total is not None:
            total += self.total.to(total.device)
            square += self.square.to(total.device)
            largest = torch.maximum(largest, self.largest.to(total.device))
        self.total, self.square, self.largest = total, square, largest

    def take(self, kept: list[_Kept]) -> None:
        """Rows that were kept, on the CPU now; those with NaN or Inf go."""
        for part in self.halves:
            batches = []
            for each in kept:
                if each.part is not part:
                    continue
                sound = each.rows.isfinite().all(1)
                lost = (len(sound) - int(sound.sum())) * each.weight
                part.count -= lost
                self.damaged += lost
                if sound.any():
                    batches.append(each.rows[sound] if lost else each.rows)
            part.take(batches, self.capacity)
        for each in kept:
            largest = torch.where(each.largest.isfinite(), each.largest, 0.0)
            self.largest = largest if self.largest is None else self.largest.maximum(largest)

    def _sum_rows(self) -> None:
        """Sums over all that was seen, as the rows that are kept have them."""
        self.total, self.square = torch.zeros(2, self.size)
        for part in self.halves:
            if part.rows:
                rows = torch.cat(part.rows).float()
                self.total += rows.mean(0) * part.count
                self.square += rows.square().mean(0) * part.count

    def finish(self) -> None:
        """Add up what waits, and bring everything to the CPU; more may be added. Of several inputs
        `settle` brings the rows first, in one copy.
        """
        settle([self])
        self._add_up()
        if not self.exact:
            if self.largest is not None:
                self._sum_rows()
            return
        for part in self.halves:
            lost = int(part.lost or 0)
            part.count -= lost
            self.damaged += lost
            part.lost = None
            part.gram = None if part.gram is None else part.gram.cpu()
        if self.total is not None:
            moments = self.total, self.square, self.largest
            self.total, self.square, self.largest = (moment.cpu() for moment in moments)

    def merge(self, other: InputStatistics) -> None:
        """Take in what another calibration saw of the same input, half by half.

        Raises:
            ValueError: another K, or one keeps rows and the other a gram.
        """
        if (self.size, self.exact) != (other.size, other.exact):
            raise ValueError(f"K={other.size} cannot be merged into K={self.size}")
        if other.total is not None:
            self._merge_moments(other)
        for mine, theirs in zip(self.halves, other.halves, strict=True):
            mine.count += theirs.count
            if theirs.gram is not None:
                mine.gram = theirs.gram if mine.gram is None else mine.gram + theirs.gram
            mine.rows = _thinned([*mine.rows, *theirs.rows], self.capacity)
        self.damaged += other.damaged

    def _merge_moments(self, other: InputStatistics) -> None:
        if self.total is None:
            self.total, self.square, self.largest = other.total, other.square, other.largest
            return
        self.total = self.total + other.total
        self.square = self.square + other.square
        self.largest = torch.maximum(self.largest, other.largest)

    def problem(self) -> str | None:
        """Why nothing can be learned from it; None when something can."""
        if not self.count:
            return "nothing was seen of its input"
        if not all(bool(part.isfinite().all()) for part in self._tensors()):
            return "its statistics hold NaN or infinite numbers"
        if not float(self.square.sum()) > 0:
            return "its input was zero all the time"
        return None

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.total, self.square, self.largest)
        for half in self.halves:
            yield from half.rows
            if half.gram is not None:
                yield half.gram

    def inputs(self, device: torch.device | str = "cpu") -> Inputs:
        """For a method, float32 on the device it computes on."""
        first, second = (self._root(half, device) for half in self.halves)
        return Inputs((first, second), (self.halves[0].count, self.halves[1].count))

    def _root(self, half: Half, device: torch.device | str) -> torch.Tensor:
        """(rows, K) with root.T @ root the mean of x^T x."""
        if not half.count:
            return torch.zeros((0, self.size), device=device)
        if half.gram is not None:
            return _gram_root(half.gram.to(device) / half.count)
        rows = torch.cat(half.rows).to(device, torch.float32)
        return rows.div_(len(rows) ** 0.5)


def settle(inputs: list[InputStatistics]) -> None:
    """Bring the rows that inputs kept to the CPU, all in one copy."""
    all_kept = list(chain.from_iterable(statistics._kept for statistics in inputs))
    if not all_kept:
        return
    rows = iter(_on_cpu([kept.rows for kept in all_kept], torch.bfloat16))
    largest = iter(_on_cpu([kept.largest for kept in all_kept], torch.float32))
    for statistics in inputs:
        kept, statistics._kept = statistics._kept, []
        statistics.take([replace(each, rows=next(rows), largest=next(largest)) for each in kept])


def _on_cpu(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies of this type, one transfer from each device."""
    copies: list[torch.Tensor | None] = [None] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[place].reshape(-1) for place in places]).to(dtype).cpu()
        parts = flat.split([tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            copies[place] = part.view(tensors[place].shape).clone()  # none holds all of them
    return copies


def _thinned(batches: list[torch.Tensor], capacity: int) -> list[torch.Tensor]:
    """Every other batch gone until they fit; one batch always stays."""
    while len(batches) > 1 and sum(map(len, batches)) > capacity:
        batches = batches[1::2]
    return batches


def _gram_root(gram: torch.Tensor) -> torch.Tensor:
    """(K, K) R with R.T @ R = gram, but for a jitter on the diagonal."""
    wide = gram.double()
    wide = (wide + wide.T) / 2
    wide.diagonal().add_(RELATIVE_JITTER * float(wide.diagonal().sum()))
    return torch.linalg.cholesky(wide).T.float().contiguous()
