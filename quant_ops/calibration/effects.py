"""What each layer's rounding does to what the model predicts.

The effect of a layer is the squared change of the prediction, relative, when this layer alone is in
NF4: outputs y become y + x Z^T, Z what rounding adds to the weight. How far other errors of the
layer reach follows in proportion. This takes evaluations of the model, no gradient.

Where in sampling this is done matters as much as the layer (emoji model, the last of six steps:
five times the first). So all layers are measured at one step, and each run has another one.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ..formats.bnb_4bit import BnbNF4
from ..spec import LayerInput

ROUNDED_TO = BnbNF4()

Again = Callable[[], torch.Tensor]
Found = dict[str, tuple[float, int]]  # layer -> (its effect, how often that was measured)


@dataclass
class Effects:
    """Measured at one step of each run, `wanted` times in all."""

    wanted: int
    taken: int = 0
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _due: int = -1  # the call of this run at which to measure
    _call: int = 0

    def start_run(self, steps: int) -> None:
        """A run of so many calls begins; 0, nobody knows how many, has none to measure at."""
        self._call = 0
        self._due = -1
        if steps and self.taken < self.wanted:
            self._due = int(_between(self.taken + 1) * steps)

    def is_due(self) -> bool:
        """Whether to measure at this call; to be asked once a call."""
        self._call += 1
        return self._call - 1 == self._due

    def measure(
        self,
        model: torch.nn.Module,
        names: Iterable[str],
        again: Again,
        result: torch.Tensor,
        size: float,
    ) -> None:
        """Evaluate the model again for every layer.

        Args:
            names: the layers that the call ran through.
            again: the same call once more, giving what `result` is undisturbed.
            size: the squared length of the prediction.
        """
        if not size:
            return
        found = {}
        devices = [result.device] if result.device.type == "cuda" else []
        for name in names:
            with torch.random.fork_rng(devices), _rounded(model.get_submodule(name)) as is_rounded:
                if is_rounded:
                    found[name] = energy(again().float() - result.float()) / size
        for name, effect in found.items():
            if effect > 0 and math.isfinite(effect):
                self._sums[name] += effect
                self._counts[name] += 1
        self.taken += 1

    def settled(self) -> Found:
        return {
            name: (self._sums[name] / count, count) for name, count in sorted(self._counts.items())
        }


@contextlib.contextmanager
def _rounded(layer: torch.nn.Module) -> Iterator[bool]:
    """The layer gives what it would give in NF4; False, and it does not, where its weight is not at
    hand: codes, or on its way from a file.
    """
    weight = getattr(layer, "weight", None)
    if not _is_plain(weight, (layer.out_features, layer.in_features)):
        yield False
        return
    change: dict[torch.device, torch.Tensor] = {}

    def hook(_: torch.nn.Module, given: tuple, output: torch.Tensor) -> torch.Tensor:
        x = given[0]
        if x.device not in change:
            change[x.device] = rounding(weight.detach().to(x.device)).to(x.dtype).T
        return output + (x @ change[x.device]).to(output.dtype)

    handle = layer.register_forward_hook(hook)
    try:
        yield True
    finally:
        handle.remove()


def rounding(weight: torch.Tensor) -> torch.Tensor:
    """What NF4 adds to a weight (N, K), or to some of its rows; float32."""
    grid = ROUNDED_TO.grid(LayerInput(tuple(weight.shape), "BF16"), ROUNDED_TO.Options())
    return grid.decode(*grid.nearest(weight)) - weight.float()


def _is_plain(weight: object, shape: tuple[int, int]) -> bool:
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and tuple(weight.shape) == shape
        and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and weight.device.type != "meta"
    )


def _between(number: int) -> float:
    """1/2, 1/4, 3/4, 1/8, 5/8, ...: the bits of a number from 1 on, behind the point, backwards."""
    found, part = 0.0, 0.5
    while number:
        found += part * (number & 1)
        number, part = number >> 1, part / 2
    return found


def energy(x: torch.Tensor) -> float:
    """Sum of squares."""
    return float(x.detach().float().square().sum(dtype=torch.float64))


def merged(mine: Found, theirs: Found) -> Found:
    """Of two calibrations: means over all measurements."""
    found = dict(mine)
    for name, (value, count) in theirs.items():
        own, times = mine.get(name, (0.0, 0))
        found[name] = ((own * times + value * count) / (times + count), times + count)
    return found


def read_effects(table: object) -> Found:
    """From a file's JSON: {layer: [effect, measurements]}.

    Raises:
        ValueError, TypeError, AttributeError: anything else.
    """
    found = {}
    for name, (value, count) in table.items():
        if type(value) is not float or not (math.isfinite(value) and value > 0):
            raise ValueError("an effect is a number above 0")
        if type(count) is not int or count < 1:
            raise ValueError("an effect was measured at least once")
        found[name] = (value, count)
    return found
