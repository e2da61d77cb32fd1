"""Running statistics of one input of a model: a bounded memory of the rows that layers were given.

Where K is small the mean of x^T x itself is kept; else rows of x, thinned out evenly as more come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..methods.inputs import Inputs

# Of the trace, which no eigenvalue exceeds: what float32 sums leave uncertain. A hundredth of the
# mean diagonal is the least that methods add themselves, for K up to 10,000 this is less.
RELATIVE_JITTER = 1e-6


@dataclass
class Half:
    """One half of what was seen. `gram` (K, K) float32 is the sum of x^T x where it is kept; else
    `rows` are bfloat16 rows, one batch a call, of every `stride`-th call.
    """

    count: int = 0
    gram: torch.Tensor | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    calls: int = 0
    stride: int = 1

    @property
    def held(self) -> int:
        return sum(len(batch) for batch in self.rows)

    def chosen(
        self, rows: torch.Tensor, each: int, generator: torch.Generator
    ) -> torch.Tensor | None:
        """At most `each` rows of every `stride`-th call, bfloat16; None for the other calls."""
        self.calls += 1
        if self.calls % self.stride:
            return None
        index = torch.randperm(len(rows), generator=generator, device=rows.device)[:each]
        return rows[index].to(torch.bfloat16)

    def take(self, batch: torch.Tensor, capacity: int) -> None:
        """Keep a batch; when there are too many rows, every other batch goes."""
        self.rows.append(batch)
        if self.held > capacity and len(self.rows) > 1:
            self.rows = self.rows[1::2]
            self.stride *= 2


@dataclass
class InputStatistics:
    """What is known of one input (rows, K).

    Args:
        size: K.
        capacity: rows that each half may keep; from 2 K on, the gram, as large, is kept instead.

    `mean`, `square` and `largest` are sums of x and x^2 and the maximum of |x| by channel, float32
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
    _unsettled: list[tuple[Half, torch.Tensor, torch.Tensor | None]] = field(
        default_factory=list, repr=False
    )

    @property
    def exact(self) -> bool:
        """Whether the gram is kept, and not rows."""
        return self.capacity >= 2 * self.size  # float32 against bfloat16

    @property
    def count(self) -> int:
        return sum(half.count for half in self.halves)

    def add(self, x: torch.Tensor, half: int, each: int, generator: torch.Generator) -> None:
        """Take in the rows of one call. Nothing here waits for a GPU: `settle` does, once.

        Args:
            x: (..., K) of any float dtype, on any device; not changed.
            half: 0 or 1: the part of the calibration it belongs to.
            each: rows of one call that may be kept, chosen by `generator`, which lives on x's
                device.
        """
        rows = x.detach().reshape(-1, self.size)
        if not len(rows):
            return
        wide = rows.float()
        sound = wide.abs().amax(1).isfinite()
        wide = torch.where(sound[:, None], wide, 0.0)
        part = self.halves[half]
        part.count += len(rows)
        kept = None
        self._add_moments(wide)
        if self.exact:
            gram = wide.T @ wide
            part.gram = gram if part.gram is None else part.gram.to(gram.device).add_(gram)
        else:
            kept = part.chosen(rows, each, generator)
        self._unsettled.append((part, (~sound).sum(), kept))

    def settle(self) -> None:
        """Bring what was added since to the CPU, without the rows that hold NaN or Inf."""
        for part, damaged, kept in self._unsettled:
            lost = int(damaged)
            part.count -= lost
            self.damaged += lost
            if kept is not None:
                batch = kept.cpu()
                part.take(batch[batch.isfinite().all(1)] if lost else batch, self.capacity)
        self._unsettled.clear()

    def _add_moments(self, wide: torch.Tensor) -> None:
        total, square, largest = wide.sum(0), wide.square().sum(0), wide.abs().amax(0)
        if self.total is not None:
            total += self.total.to(total.device)
            square += self.square.to(total.device)
            largest = torch.maximum(largest, self.largest.to(total.device))
        self.total, self.square, self.largest = total, square, largest

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

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor: moved to the CPU when collecting ends."""
        if self.total is not None:
            self.total, self.square, self.largest = map(
                change, (self.total, self.square, self.largest)
            )
        for half in self.halves:
            half.gram = None if half.gram is None else change(half.gram)


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
