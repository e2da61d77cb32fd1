"""Choose one option a layer: the least error within so many bytes, or the fewest bytes within so
much error.

A multiple-choice knapsack. Along the lower convex hull of every layer's options (bytes, cost) the
steps with the most gain per byte come first, which is optimal for the budgets it passes; what
is left after the last step that fits is filled by dynamic programming over the layers around it,
with all their options, also those above the hull. Equal inputs give equal choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Layers that are chosen anew together, and steps of their bytes: 64 x 8 options x 100,000 states
# take 0.3 s and 6 MB. Rounding to steps can waste 64 / 100,000 of their bytes.
CORE, STATES = 64, 100_000
BISECTIONS = 40


@dataclass(frozen=True)
class Option:
    """One way to store a layer: its bytes, and its part of the error that is summed."""

    bytes: int
    cost: float


@dataclass(frozen=True)
class Step:
    """From one option of a layer's hull to the next larger one."""

    layer: int
    option: int  # the larger one
    bytes: int
    gain: float

    @property
    def rank(self) -> tuple[float, int, int]:
        """The most gain per byte first, then the order of layers."""
        return -self.gain / self.bytes, self.layer, self.bytes


def least_error(layers: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Which option of each layer: the smallest sum of costs within `budget` bytes.

    Returns:
        An index per layer; None where even the smallest options do not fit.
    """
    chosen = [hull(options)[0] for options in layers]
    left = budget - total_bytes(layers, chosen)
    if left < 0:
        return None
    steps = sorted(_steps(layers), key=lambda step: step.rank)
    taken, stopped, edge = list(chosen), set(), len(steps)
    for rank, step in enumerate(steps):
        if step.layer in stopped:
            continue
        if step.bytes > left:
            stopped.add(step.layer)
            edge = min(edge, rank)
            continue
        taken[step.layer] = step.option
        left -= step.bytes
    if not stopped:
        return taken
    core = _around(steps, edge)
    filled = _filled(layers, taken, core, budget)
    return min(
        (taken, filled), key=lambda found: (total_cost(layers, found), total_bytes(layers, found))
    )


def fewest_bytes(layers: Sequence[Sequence[Option]], limit: float) -> list[int] | None:
    """Which option of each layer: the fewest bytes whose sum of costs is at most `limit`.

    Returns:
        An index per layer; None where even the best options have more error.
    """
    best = [hull(options)[-1] for options in layers]
    if total_cost(layers, best) > limit:
        return None
    smallest = [hull(options)[0] for options in layers]
    low = total_bytes(layers, smallest) - 1
    high = total_bytes(layers, best)
    for _ in range(BISECTIONS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        found = least_error(layers, middle)
        if found is not None and total_cost(layers, found) <= limit:
            best, high = found, total_bytes(layers, found)
        else:
            low = middle
    return best


def hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull, by rising bytes and falling cost."""
    order = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].cost, i))
    found: list[int] = []
    for index in order:
        if found and options[index].cost >= options[found[-1]].cost:
            continue
        while len(found) > 1 and _above(options[found[-2]], options[found[-1]], options[index]):
            found.pop()
        found.append(index)
    return found


def _above(first: Option, middle: Option, last: Option) -> bool:
    """Whether the middle one lies on or above the line between the others."""
    rise = (middle.cost - first.cost) * (last.bytes - first.bytes)
    return rise >= (last.cost - first.cost) * (middle.bytes - first.bytes)


def _steps(layers: Sequence[Sequence[Option]]) -> list[Step]:
    steps = []
    for layer, options in enumerate(layers):
        corners = hull(options)
        for small, large in zip(corners, corners[1:], strict=False):
            more = options[large].bytes - options[small].bytes
            steps.append(Step(layer, large, more, options[small].cost - options[large].cost))
    return steps


def _around(steps: Sequence[Step], edge: int) -> list[int]:
    """The layers whose steps are nearest to the one at which the budget ended."""
    near = sorted(range(len(steps)), key=lambda rank: (abs(rank - edge), rank))
    nearest = dict.fromkeys(steps[rank].layer for rank in near)
    return sorted(list(nearest)[:CORE])


def _filled(
    layers: Sequence[Sequence[Option]], taken: list[int], core: list[int], budget: int
) -> list[int]:
    """The choice where the core's layers are chosen anew, the others as they are."""
    inside = set(core)
    outside = sum(layers[i][j].bytes for i, j in enumerate(taken) if i not in inside)
    smallest = [layers[i][hull(layers[i])[0]].bytes for i in core]
    spare = budget - outside - sum(smallest)
    unit = max(1, math.ceil(spare / STATES))
    states = spare // unit + 1
    best, choices = np.zeros(states), []
    for i, least in zip(core, smallest, strict=True):
        extra = [math.ceil((option.bytes - least) / unit) for option in layers[i]]
        total = np.full((len(extra), states), np.inf)
        for row, steps, option in zip(total, extra, layers[i], strict=True):
            if steps < states:
                row[steps:] = best[: states - steps] + option.cost
        choices.append((total.argmin(0).astype(np.uint8), extra))
        best = total.min(0)
    result, state = list(taken), states - 1
    for i, (choice, extra) in zip(reversed(core), reversed(choices), strict=True):
        result[i] = int(choice[state])
        state -= extra[result[i]]
    return result


def total_bytes(layers: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(options[i].bytes for options, i in zip(layers, chosen, strict=True))


def total_cost(layers: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return math.fsum(options[i].cost for options, i in zip(layers, chosen, strict=True))
