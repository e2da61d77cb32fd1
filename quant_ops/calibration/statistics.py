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

    @property
    def exact(self) -> bool:
        """Whether the gram is kept, and not rows."""
        return self.capacity >= 2 * self.size  # float32 against bfloat16

    @property
    def count(self) -> int:
        return sum(half.count for half in self.halves)

    def add(self, x: torch.Tensor, half: int, each: int, generator: torch.Generator) -> None:
        """Take in the rows of one call.

        Args:
            x: (..., K) of any float dtype, on any device; not changed.
            half: 0 or 1: the part of the calibration it belongs to.
            each: rows of one call that may be kept, chosen by `generator`, which lives on x's
                device.
        """
        rows = x.detach().reshape(-1, self.size)
        sound = rows.float().abs().amax(1).isfinite()
        if not bool(sound.all()):
            self.damaged += int((~sound).sum())
            rows = rows[sound]
        if not len(rows):
            return
        wide = rows.float()
        part = self.halves[half]
        part.count += len(rows)
        self._add_moments(wide)
        if self.exact:
            gram = wide.T @ wide
            part.gram = gram if part.gram is None else part.gram.to(gram.device).add_(gram)
        else:
            self._keep(part, rows, each, generator)

    def _add_moments(self, wide: torch.Tensor) -> None:
        total, square, largest = wide.sum(0), wide.square().sum(0), wide.abs().amax(0)
        if self.total is not None:
            total += self.total.to(total.device)
            square += self.square.to(total.device)
            largest = torch.maximum(largest, self.largest.to(total.device))
        self.total, self.square, self.largest = total, square, largest

    def _keep(self, part: Half, rows: torch.Tensor, each: int, generator: torch.Generator) -> None:
        """Some rows of every `stride`-th call; when there are too many, every other batch goes."""
        part.calls += 1
        if part.calls % part.stride:
            return
        index = torch.randperm(len(rows), generator=generator, device=rows.device)[:each]
        part.rows.append(rows[index].to("cpu", torch.bfloat16))
        if part.held > self.capacity and len(part.rows) > 1:
            part.rows = part.rows[1::2]
            part.stride *= 2

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
