"""Histograms of a few layers of a file: their decoded weights, and their codes. Nothing else of it
is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoint.importers.source import ImportedSource
from ..formats import get_format
from ..sources import TensorSource

BINS = 81  # odd: zero, which has a code of its own, lies in the middle of a bin
SPREAD = 4.0  # standard deviations of the first file's weights that are shown on either side


@dataclass(frozen=True)
class Histogram:
    """One layer. `weights` has a row of shares (BINS,) a file, of its weights between `edges`
    (BINS + 1,); what lies outside counts at the ends. `codes` are shares by code in the order of
    values, the first of which is `lowest`; None where the last file holds no codes.
    """

    name: str
    format: str
    edges: np.ndarray
    weights: tuple[np.ndarray, ...]
    codes: np.ndarray | None = None
    lowest: int = 0


def histograms(names: Sequence[str], *files: TensorSource) -> list[Histogram]:
    """Of these layers; those that a file does not have are left out.

    Args:
        names: a file may put a prefix before them.
        files: the last one's codes are counted; those before it are drawn beside it.

    Raises:
        CheckpointError: a file that cannot be read without guessing.
    """
    read = [ImportedSource(file, retarget=lambda made: made.decoded("F32", "")) for file in files]
    found = []
    for name in names:
        own = [_full_name(file, name) for file in read]
        if all(own):
            found.append(_histogram(name, own, read))
    return found


def _full_name(file: ImportedSource, name: str) -> str | None:
    """What the file calls a layer; None where it has none, or two."""
    key = f"{name}.weight"
    if key in file.header.tensors:
        return name
    ends = [full for full in file.header.tensors if full.endswith(f".{key}")]
    if len(ends) == 1:
        return ends[0].removesuffix(".weight")
    return None


def _histogram(name: str, own: Sequence[str], files: Sequence[ImportedSource]) -> Histogram:
    weights = []
    for full, file in zip(own, files, strict=True):
        values = file.read(f"{full}.weight").float().reshape(-1)
        weights.append(values[values.isfinite()])
    reach = 1.0
    if len(weights[0]):
        reach = SPREAD * float(weights[0].std(correction=0)) or 1.0
    edges = np.linspace(-reach, reach, BINS + 1)
    rows = tuple(_shares(values, edges) for values in weights)
    last, full = files[-1], own[-1]
    made = last.canonical.get(full)
    if made is None:
        return Histogram(name, "as it is", edges, rows)
    if made.format is None:
        return Histogram(name, made.dialect, edges, rows)
    stored = last.contents.layers[full]
    tensors = made.convert({suffix: stored.read(suffix) for suffix in stored.specs})
    codes, lowest = _counted(get_format(made.format).codes(tensors))
    return Histogram(name, made.format, edges, rows, codes=codes, lowest=lowest)


def _shares(values: torch.Tensor, edges: np.ndarray) -> np.ndarray:
    inside = values.clamp(float(edges[0]), float(edges[-1])).numpy()
    return np.histogram(inside, edges)[0] / max(len(inside), 1)


def _counted(codes: torch.Tensor) -> tuple[np.ndarray, int]:
    """(share of each code by rising value, the first code)."""
    flat = codes.reshape(-1)
    counts = np.bincount(flat.view(torch.uint8).numpy(), minlength=256) / max(len(flat), 1)
    if flat.dtype == torch.int8:
        used = np.roll(counts, 128)  # -128 first
        first = -128
    elif flat.dtype.is_floating_point:
        values = torch.arange(256, dtype=torch.uint8).view(flat.dtype).float().numpy()
        order = np.argsort(values, kind="stable")
        used = counts[order[np.isfinite(values[order])]]
        first = -(len(used) // 2)
    else:
        used, first = counts[:16] if not counts[16:].any() else counts, 0
    held = np.flatnonzero(used)
    if flat.dtype == torch.int8 and len(held) and len(used) == 256:
        low, high = held[0], held[-1] + 1
        return used[low:high], first + int(low)
    return used, first
