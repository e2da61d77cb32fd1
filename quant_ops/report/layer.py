"""What was measured of one layer, on the codes that were stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ...kernels.grids import Deviation
from ..methods import Inputs
from ..options import stated

COUNTED = 1 << 24  # codes looked at together on a GPU: a mask of 16 MB
COUNTED_ON_CPU = 1 << 18  # in its cache, with their mask
DROWNED = 0.5  # of a patch that survives: with less, rounding moved the weight more than it did


@dataclass(frozen=True)
class OutputError:
    """Of a layer's outputs for the inputs of a calibration: ||x (d - w)^T|| / ||x w^T||.

    `seen` says whether the method worked from the same inputs; only if not it is held out, and says
    what other prompts will meet.
    """

    relative: float
    seen: bool


@dataclass(frozen=True)
class Retention:
    """What is left of a patch (a LoRA) that was baked into a weight w before it was rounded to d.

    `kept` is the part of the change that is there: (d - w) along it, 1 where all of it is. `noise`
    is the length of the rounding error over that of the change; `cosine` that of the angle between
    the change and d - w.
    """

    kept: float
    noise: float
    cosine: float

    @property
    def survived(self) -> float:
        """From 0 to 1: what is there of the change, at most its share of the squares of all that
        changed; that is 1 / (1 + noise^2) of noise that has nothing to do with it.
        """
        if self.cosine <= 0:
            return 0.0
        return min(self.kept, self.cosine**2)

    @property
    def drowned(self) -> bool:
        """Whether more of it is lost or covered by rounding than survives."""
        return self.survived < DROWNED

    def to_json(self) -> dict:
        return {
            "survived": self.survived,
            "kept": self.kept,
            "noise": self.noise,
            "cosine": self.cosine,
        }


@dataclass(frozen=True)
class LayerResult:
    """Measured on the stored codes: how far they are from the weight, over all elements.

    `saturated` counts codes at either end of their format's range: with scales from the largest
    magnitude one for each scale, more where a method cuts off. A method other than nearest also has
    its own objective, and both numbers for nearest; `verdict` says why nearest was stored in its
    place, empty when it was not. `moved_to_cpu`: the device had too little memory for it.
    """

    name: str
    format: str
    method: str
    deviation: Deviation
    elements: int = 0
    saturated: int = 0
    squared_error_nearest: float | None = None
    objective: float | None = None
    objective_nearest: float | None = None
    verdict: str = ""
    output: OutputError | None = None
    retention: Retention | None = None
    moved_to_cpu: bool = False

    @property
    def norm(self) -> float:
        """Sum of the squares of the stored weights d = w + (d - w)."""
        return self.deviation.signal + 2 * self.deviation.product + self.deviation.error

    @property
    def rel_l2(self) -> float:
        """||dec - w|| / ||w||; 0 for an all-zero weight."""
        error, signal, *_ = self.deviation
        return relative(error, signal)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB; None when there is no error at all."""
        return decibels(self.rel_l2)

    @property
    def cosine(self) -> float | None:
        """Of the angle between weight and codes; None when either is zero."""
        error, signal, product, _ = self.deviation
        decoded = signal + 2 * product + error
        if signal <= 0 or decoded <= 0:
            return None
        return min((signal + product) / math.sqrt(signal) / math.sqrt(decoded), 1.0)

    @property
    def saturated_fraction(self) -> float:
        if self.elements:
            return self.saturated / self.elements
        return 0.0

    @property
    def against_nearest(self) -> dict | None:
        """This method's weight error and objective, x nearest's; None for nearest itself, 1.0 where
        both are zero.
        """
        if self.objective is None:
            return None
        stored = self.method
        if self.verdict:
            stored = "nearest"
        error = _ratio(self.deviation.error, self.squared_error_nearest)
        return {
            "rel_l2": math.sqrt(error),
            "objective": _ratio(self.objective, self.objective_nearest),
            "stored": stored,
            "verdict": self.verdict,
        }

    def to_json(self) -> dict:
        """What the report says of the layer beside its plan."""
        said = {
            "rel_l2": self.rel_l2,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
            "saturated": self.saturated_fraction,
            "largest_error": self.deviation.largest,
            **stated(against_nearest=self.against_nearest),
        }
        if self.retention:
            said["patch"] = self.retention.to_json()
        if self.output:
            said |= {"output_error": self.output.relative, "output_seen": self.output.seen}
        return said


def relative(error: float, signal: float) -> float:
    """Relative error from two sums of squares; 0 where there is no signal."""
    if signal:
        return math.sqrt(error / signal)
    return 0.0


def decibels(rel_l2: float | None) -> float | None:
    """Signal to noise of a relative error in dB; None where there is none."""
    if rel_l2:
        return -20.0 * math.log10(rel_l2)
    return None


def saturated(codes: torch.Tensor, ends: tuple[int, ...]) -> int:
    """How many codes have one of these bytes.

    On a CPU numpy counts, into one mask: .15 ns a code, where torch's comparison of bytes takes
    4.5.
    """
    flat = codes.reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        return _counted(flat.numpy(), ends)
    counts = [(part == end).sum() for part, end in product(flat.split(COUNTED), ends)]
    if counts:
        return int(torch.stack(counts).sum())
    return 0


def _counted(codes: np.ndarray, ends: tuple[int, ...]) -> int:
    mask = np.empty(min(COUNTED_ON_CPU, codes.size), dtype=bool)
    count = 0
    for start in range(0, codes.size, COUNTED_ON_CPU):
        part = codes[start : start + COUNTED_ON_CPU]
        found = mask[: part.size]
        for end in ends:
            np.equal(part, np.uint8(end), out=found)
            count += int(np.count_nonzero(found))
    return count


def output_error(
    weight: torch.Tensor, decoded: torch.Tensor, inputs: Inputs, *, seen: bool
) -> OutputError | None:
    """What the error does to the outputs; None where the layer gives none.

    Args:
        weight, decoded: (N, K), both in the basis of the inputs.
    """
    error = signal = 0.0
    wide = weight.float()
    difference = decoded.float() - wide
    for half, count in zip(inputs.halves, inputs.counts, strict=True):
        if count:
            share = count / sum(inputs.counts)
            error += share * float((half @ difference.T).square().sum(dtype=torch.float64))
            signal += share * float((half @ wide.T).square().sum(dtype=torch.float64))
    if not (signal > 0 and math.isfinite(signal) and math.isfinite(error)):
        return None
    return OutputError(math.sqrt(error / signal), seen)


def retention(base: torch.Tensor, weight: torch.Tensor, decoded: torch.Tensor) -> Retention | None:
    """What is left of the change from `base` to `weight` in `decoded`; None without a change.

    Args:
        base, weight, decoded: (N, K), all in the basis that gets codes.
    """
    change = error = both = 0.0
    for rows in torch.arange(len(weight)).split(max(1, COUNTED // max(1, weight.shape[1]))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        wide = weight[part].double()
        delta, noise = wide - base[part].double(), decoded[part].double() - wide
        change += float((delta * delta).sum())
        error += float((noise * noise).sum())
        both += float((delta * noise).sum())
    if not change > 0:
        return None
    cosine, moved = 0.0, change + 2 * both + error
    if moved > 0:
        cosine = (change + both) / math.sqrt(change * moved)
    return Retention(kept=1 + both / change, noise=math.sqrt(error / change), cosine=cosine)


def _ratio(value: float, reference: float) -> float:
    if reference:
        return value / reference
    return 1.0
