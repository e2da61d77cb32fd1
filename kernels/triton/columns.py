"""Columns rounded one after the other, the change of each moving those after it: a block of columns
in one launch. Rows of a weight do not depend on each other, so a program takes some of them, and
keeps what their columns changed in registers.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

from ..columns import Sweep
from ..levels import Levels, code_values
from ..scales import TINY
from .launch import launch
from .rounding import divide, nearest_even

KINDS = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}
TABLES = 3  # a table of values for each element
_INT8, _E4M3, _CODES, _TABLES = (tl.constexpr(kind) for kind in (*KINDS.values(), TABLES))
CODES = 16
Swept3 = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Rows of a program, and its warps: 3072 rows are 192 programs, more than an H200 has processors.
ROWS, WARPS = 16, 4


@triton.jit
def _sweep(
    state, mixing, before, zero, kept, scale, table, codes, values, change,
    n, size, scale_column, scale_row,
    KIND: tl.constexpr, QMAX: tl.constexpr, COUNT: tl.constexpr,
    DESCEND: tl.constexpr, ZEROS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    at = tl.arange(0, SIZE)
    changes = tl.zeros((SIZE, ROWS), dtype=tl.float32)
    for column in range(size):
        here = column * n + row
        share = tl.load(mixing + column * size + at, at < column, other=0.0)
        x = tl.load(state + here, inside, other=0.0) + tl.sum(share[:, None] * changes, 0)
        if DESCEND:
            was = tl.load(before + here, inside, other=0.0)
            x = was - divide(x, tl.load(mixing + column * size + column))
        else:
            was = x
        s = tl.load(scale + column * scale_column + row * scale_row, inside, other=1.0)
        if KIND == _INT8:
            x = divide(x, tl.where(s == 0.0, 1.0, s))
            level = nearest_even(tl.minimum(tl.maximum(x, -QMAX), QMAX))
            code = level.to(tl.int8).to(tl.uint8, bitcast=True)
            value = level * s
        elif KIND == _E4M3:
            x = x * divide(1.0, tl.where(s == 0.0, 1.0, s))
            level = tl.minimum(tl.maximum(x, -QMAX), QMAX).to(tl.float8e4nv)
            code = level.to(tl.uint8, bitcast=True)
            value = level.to(tl.float32) * s
        elif KIND == _CODES:
            # ascending levels, thresholds between them and codes: three runs of the table
            value = tl.zeros((ROWS,), dtype=tl.float32) + tl.load(table)
            number = tl.zeros((ROWS,), dtype=tl.float32) + tl.load(table + 2 * COUNT)
            x = x * divide(1.0, tl.where(s == 0.0, 1.0, s))
            for index in tl.static_range(1, COUNT):
                above = x > tl.load(table + COUNT + index)
                value = tl.where(above, tl.load(table + index), value)
                number = tl.where(above, tl.load(table + 2 * COUNT + index), number)
            code = number.to(tl.uint8)
            value = value * s
        else:
            x = divide(x, s)
            value = tl.load(table + column * COUNT * n + row, inside, other=0.0)
            code = tl.zeros((ROWS,), dtype=tl.uint8)
            for index in tl.static_range(1, COUNT):
                other = tl.load(table + (column * COUNT + index) * n + row, inside, other=0.0)
                closer = tl.abs(other - x) < tl.abs(value - x)
                value = tl.where(closer, other, value)
                code = tl.where(closer, index, code).to(tl.uint8)
            value = value * s
        if ZEROS:
            stays = tl.load(zero + here, inside, other=0) != 0
            code = tl.where(stays, tl.load(kept + here, inside, other=0), code)
            value = tl.where(stays, 0.0, value)
        moved = value - was
        changes = tl.where((at == column)[:, None], moved[None, :], changes)
        tl.store(codes + here, code, inside)
        tl.store(values + here, value, inside)
        tl.store(change + here, moved, inside)


@cache
def _table(levels: Levels, device: torch.device) -> torch.Tensor:
    """(3, 16) float32: the levels ascending, what x must exceed for each, and their codes."""
    values = code_values(levels)
    # -0 stands before +0, and is for numbers below 0 only
    codes = sorted(range(CODES), key=lambda code: (values[code], math.copysign(1.0, values[code])))
    ascending = [values[code] for code in codes]
    between = [(low + high) / 2 or -TINY for low, high in zip(ascending, ascending[1:])]
    rows = ascending, [float("-inf"), *between], codes
    return torch.tensor(rows, dtype=torch.float32, device=device)


def sweep_levels(levels: Levels, scale: torch.Tensor, sweep: Sweep) -> Swept3:
    """(codes, values, change), see `kernels.columns.Swept`."""
    table = sweep.state  # not read where codes are no places in a table
    if levels.dtype == torch.uint8:
        table = _table(levels, table.device)
    steps = 1, 0
    if scale.shape[1] > 1:
        steps = scale.shape[1], 1
    numbers = (*steps, KINDS[levels.dtype], levels.qmax, CODES)
    return _swept(sweep, scale, table, numbers)


def sweep_tables(values: torch.Tensor, unit: torch.Tensor, sweep: Sweep) -> Swept3:
    """(codes, values, change), see `kernels.columns.Swept`."""
    return _swept(sweep, unit, values, (0, 1, TABLES, 0.0, values.shape[1]))


def _swept(sweep: Sweep, scale: torch.Tensor, table: torch.Tensor, numbers: tuple) -> Swept3:
    state, mixing, before, zero, kept = sweep
    size, n = state.shape
    codes = torch.empty((size, n), dtype=torch.uint8, device=state.device)
    values, change = (torch.empty((size, n), device=state.device) for _ in range(2))
    flags = (before is not None, zero is not None, triton.next_power_of_2(size), ROWS)
    if before is None:  # what is not there is not read: any address will do
        before = state
    if zero is None:
        zero = kept = codes
    tensors = (
        state.contiguous(),
        mixing.t().contiguous(),
        before.contiguous(),
        zero.contiguous().view(torch.uint8),
        kept.contiguous(),
        scale.contiguous(),
        table.contiguous(),
        codes,
        values,
        change,
    )
    launch(_sweep, (-(-n // ROWS), 1, 1), tensors, n, size, *numbers, *flags, num_warps=WARPS)
    return codes, values, change
