"""Columns of a weight under fixed scales, rounded one after the other: what methods need that
choose each column's codes after the errors of the columns before it.

Everything is transposed: a column is one contiguous row of N values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .dispatch import op
from .levels import Levels
from .triton import why_not_codes_of

MOST_COLUMNS = 128  # that a kernel keeps the changes of in registers


class Sweep(NamedTuple):
    """What a sweep begins with.

    `state` (columns, N) float32, not changed: without `before` what the columns should be; else the
    slope of what is minimised along their values.
    `mixing` (columns, columns) float32: row i, times i's change, is added to each later column's
    state. With `before` its diagonal is the slope's own slope.
    `before` (columns, N) float32: the values that the columns have; None where they have none yet,
    and a change is the rounding error.
    `zero` (columns, N) bool: the weights that keep their code, which decodes to 0; `kept`
    (columns, N) uint8: those codes. None where there are none.
    """

    state: torch.Tensor
    mixing: torch.Tensor
    before: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    kept: torch.Tensor | None = None


class Swept(NamedTuple):
    """What a sweep chose, all (columns, N): `codes`, their bytes as uint8; `values`, float32, the
    codes decoded; `change`, float32, from what a column was to its values.
    """

    codes: torch.Tensor
    values: torch.Tensor
    change: torch.Tensor


class Columns(Protocol):
    """Some columns of one weight."""

    def nearest(self, column: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round a column.

        Args:
            column: which of these columns.
            x: (N,) float32, what the column should be; not changed.

        Returns:
            codes: (N,) as the grid's own `encode` would give for x, zero regions excepted.
            values: (N,) float32, the codes decoded.
        """

    def sweep(self, sweep: Sweep) -> Swept:
        """Round the columns in order; the change of each moves the state of the later ones."""


def _swept(columns: Columns, sweep: Sweep) -> Swept:
    mixing, before = sweep.mixing, sweep.before
    state, change = sweep.state.clone(), torch.empty_like(sweep.state)
    codes, values = torch.empty_like(state, dtype=torch.uint8), torch.empty_like(state)
    for at in range(len(state)):
        wanted = state[at] if before is None else before[at] - state[at] / mixing[at, at]
        code, value = columns.nearest(at, wanted)
        code = code.view(torch.uint8)
        if sweep.zero is not None:
            code = torch.where(sweep.zero[at], sweep.kept[at], code)
            value = value.masked_fill_(sweep.zero[at], 0.0)
        codes[at], values[at] = code, value
        torch.sub(value, wanted if before is None else before[at], out=change[at])
        state[at + 1 :].addr_(mixing[at, at + 1 :], change[at])
    return Swept(codes, values, change)


@op
def sweep_levels(levels: Levels, scale: torch.Tensor, *sweep: torch.Tensor | None) -> Swept:
    """`LevelColumns.sweep`, given the parts of a Sweep; a backend adds up in another order."""
    return _swept(LevelColumns(levels, scale), Sweep(*sweep))


def _why_not_sweep_levels(levels, scale, state, *others) -> str | None:
    if levels.dtype == torch.float8_e5m2:
        return f"no kernel rounds to {levels.name}"
    return _why_not_so_many(state) or why_not_codes_of(state, levels.dtype)


def _why_not_so_many(state: torch.Tensor) -> str | None:
    if len(state) > MOST_COLUMNS:
        return f"{len(state)} columns, at most {MOST_COLUMNS}"
    return None


@sweep_levels.backend("triton", _why_not_sweep_levels)
def _sweep_levels(levels, scale, *sweep):
    from .triton import columns

    return Swept(*columns.sweep_levels(levels, scale, Sweep(*sweep)))


@op
def sweep_tables(values: torch.Tensor, unit: torch.Tensor, *sweep: torch.Tensor | None) -> Swept:
    """`TableColumns.sweep`, given the parts of a Sweep; a backend adds up in another order."""
    return _swept(TableColumns(values, unit), Sweep(*sweep))


def _why_not_sweep_tables(values, unit, state, *others) -> str | None:
    return _why_not_so_many(state) or why_not_codes_of(state, torch.uint8)


@sweep_tables.backend("triton", _why_not_sweep_tables)
def _sweep_tables(values, unit, *sweep):
    from .triton import columns

    return Swept(*columns.sweep_tables(values, unit, Sweep(*sweep)))


@dataclass(frozen=True)
class LevelColumns:
    """Columns whose values are levels times a scale: `scale` is (columns, N), or (columns, 1) where
    all rows share it. A scale of 0 decodes to 0 whatever the code.
    """

    levels: Levels
    scale: torch.Tensor

    def nearest(self, column: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.scale[column]
        divisor = torch.where(scale == 0, 1.0, scale)
        codes = self.levels.round_(self.levels.normalise_(x.clone(), divisor)).to(self.levels.dtype)
        return codes, self.levels.widen(codes).mul_(scale)

    def sweep(self, sweep: Sweep) -> Swept:
        return sweep_levels(self.levels, self.scale, *sweep)


@dataclass(frozen=True)
class TableColumns:
    """Columns with a table of values for each element: `values` is (columns, codes, N), ascending
    along the codes; ties go to the lower one. `unit` (N,) multiplies all of a row.
    """

    values: torch.Tensor
    unit: torch.Tensor

    def nearest(self, column: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.values[column]
        codes = (table - x / self.unit).abs_().argmin(0, keepdim=True)
        return codes[0].to(torch.uint8), table.gather(0, codes)[0] * self.unit

    def sweep(self, sweep: Sweep) -> Swept:
        return sweep_tables(self.values, self.unit, *sweep)
