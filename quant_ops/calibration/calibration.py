"""A calibration: the statistics of every distinct input of a model, which layers get which, and the
file that holds them.

One safetensors file. `<n>` numbers the distinct inputs, `<h>` is 0 or 1:

| tensor | dtype, shape | what |
|---|---|---|
| `input.<n>.total`, `.square`, `.largest` | F32 (K,) | sums of x and x^2, maximum of abs(x) |
| `input.<n>.<h>.gram` | F32 (K, K) | sum of x^T x over that half, where K is small |
| `input.<n>.<h>.rows` | BF16 (rows, K) | else some of its rows |

Metadata: `fewbits.calibration` is JSON: `version` 1, `layers` {layer: [n, N, K]}, `inputs`
[{"size", "capacity", "counts": [rows of half 0, of half 1], "damaged"}], and where effects were
measured `effects` {layer: [effect, measurements]}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save

from ..checkpoint.header import MAX_SIZE
from ..checkpoint.reader import FileSource
from ..errors import CheckpointError
from ..files import InputFile
from ..methods.inputs import Inputs
from ..part import write_whole
from ..strict_json import parse, shown
from .effects import merged, read_effects
from .statistics import Half, InputStatistics

KEY = "fewbits.calibration"
VERSION = 1
# Names under which ComfyUI or a file nests a diffusion model; a calibration has names without.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "cond_stage_model.")
# Stands between a text encoder's name in ComfyUI and the names in its own file.
ENCODER = ".transformer."


@dataclass
class Calibration:
    """`layers` maps a layer's name to (which of `inputs`, N, K), `effects` to what its rounding
    does to the prediction and how often that was measured (`effects.py`); `files` it was read from
    are never an output.
    """

    layers: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    inputs: list[InputStatistics] = field(default_factory=list)
    effects: dict[str, tuple[float, int]] = field(default_factory=dict)
    files: tuple[InputFile, ...] = field(default=(), compare=False)

    def missing(self, base: str, shape: tuple[int, int]) -> str | None:
        """Why a layer of this (N, K) cannot be rounded by it; None when it can."""
        found = self._find(base, shape)
        if found is None:
            return "not in the calibration"
        index, *seen = found
        if tuple(seen) != tuple(shape):
            return f"{shape[0]}x{shape[1]}, in the calibration {seen[0]}x{seen[1]}"
        return self.inputs[index].problem()

    def inputs_of(
        self, base: str, shape: tuple[int, int], device: torch.device | str = "cpu"
    ) -> Inputs | None:
        """What a method needs to know of a layer (N, K); None for one that is not in it.

        Raises:
            CheckpointError: numbers that no rows can have led to.
        """
        found = self._find(base, shape)
        if found is None:
            return None
        try:
            return self.inputs[found[0]].inputs(device)
        except torch.linalg.LinAlgError:
            raise CheckpointError(
                f"layer '{base}': its statistics in the calibration are sums of no squares, so the "
                "calibration is damaged: make it again"
            ) from None

    def largest_input(self, base: str, shape: tuple[int, int]) -> float | None:
        """The largest magnitude that a layer (N, K) was given; None where nothing is known."""
        if self.missing(base, shape):
            return None
        index, *_ = self._find(base, shape)
        return float(self.inputs[index].largest.max())

    def effect_of(self, base: str) -> float | None:
        """Squared change of the prediction, relative, with this layer in NF4; None where that was
        not measured.
        """
        found = self.effects.get(base) or self.effects.get(_plain(base))
        return found and found[0]

    def _find(self, base: str, shape: tuple[int, int]) -> tuple[int, int, int] | None:
        """The entry of a layer, whatever its file puts before its name. Of text encoders that name
        their layers alike the one of this shape; None where that leaves two.
        """
        named = self.layers.get(base) or self.layers.get(_plain(base))
        if named is not None:
            return named
        alike = [entry for name, entry in self.layers.items() if _tail(name) == _tail(base)]
        fitting = [entry for entry in alike if entry[1:] == tuple(shape)] or alike
        if len(fitting) == 1:
            return fitting[0]
        return None

    def refuse_another_model(self, shapes: Mapping[str, tuple[int, int]], name: str) -> None:
        """Check that it was made of a model like this one.

        Args:
            shapes: base name -> (N, K) of the model's layers.

        Raises:
            CheckpointError: it knows none of them, or knows some in other shapes.
        """
        known = {base: self._find(base, shape) for base, shape in shapes.items()}
        found = {base: entry for base, entry in known.items() if entry}
        if not found:
            raise CheckpointError(
                f"{name}: the calibration knows none of the {len(shapes)} layers to round; it was "
                f"made of another model (with layers such as {next(iter(self.layers), 'none')!r})"
            )
        for base, (_, *seen) in found.items():
            if tuple(seen) != tuple(shapes[base]):
                raise CheckpointError(
                    f"{name}: layer '{base}' is {list(shapes[base])}, in the calibration {seen}: "
                    "it was made of another model; calibrate with this one"
                )

    def merge(self, other: Calibration) -> None:
        """Take in another calibration of the same model.

        Raises:
            CheckpointError: it has other layers, shapes or a different sharing of inputs.
        """
        if not self.layers:
            self.layers, self.inputs = dict(other.layers), list(other.inputs)
            self.effects = dict(other.effects)
            return
        if self.layers != other.layers or len(self.inputs) != len(other.inputs):
            raise CheckpointError("two calibrations of different models cannot be merged")
        for mine, theirs in zip(self.inputs, other.inputs, strict=True):
            try:
                mine.merge(theirs)
            except ValueError as error:
                raise CheckpointError(f"two calibrations cannot be merged: {error}") from None
        self.effects = merged(self.effects, other.effects)

    @property
    def rows(self) -> int:
        """Rows that the input with the most of them saw."""
        return max((statistics.count for statistics in self.inputs), default=0)

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_calibration` writes: tensors and metadata."""
        tensors: dict[str, torch.Tensor] = {}
        for number, statistics in enumerate(self.inputs):
            tensors |= {f"input.{number}.{key}": value for key, value in _stored(statistics)}
        facts = list(map(_facts, self.inputs))
        table = {"version": VERSION, "layers": self.layers, "inputs": facts}
        if self.effects:
            table["effects"] = self.effects
        return tensors, {KEY: json.dumps(table, separators=(",", ":"))}


def _plain(name: str) -> str:
    """The name without what a file or ComfyUI puts before it."""
    return next((name[len(p) :] for p in PREFIXES if name.startswith(p)), name)


def _tail(name: str) -> str:
    """`clip_l.transformer.a` -> `a`; any other name as it is."""
    return name.partition(ENCODER)[2] or name


def _stored(statistics: InputStatistics):
    if statistics.total is None:
        return
    yield "total", statistics.total
    yield "square", statistics.square
    yield "largest", statistics.largest
    for index, half in enumerate(statistics.halves):
        if half.gram is not None:
            yield f"{index}.gram", half.gram
        if half.rows:
            yield f"{index}.rows", torch.cat(half.rows)


def _facts(statistics: InputStatistics) -> dict:
    return {
        "size": statistics.size,
        "capacity": statistics.capacity,
        "counts": [half.count for half in statistics.halves],
        "damaged": statistics.damaged,
    }


def save_calibration(calibration: Calibration, path: str | os.PathLike) -> None:
    """Write a calibration; the file appears complete or not at all, and replaces an older one.

    Raises:
        CheckpointError: nothing was collected, or the disk does not take it.
    """
    if not calibration.rows:
        raise CheckpointError(
            f"{Path(path).name}: nothing was collected; sample with the Calibrate node's model "
            "first"
        )
    tensors, metadata = calibration.to_tensors()
    data = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata)
    try:
        write_whole(Path(path), data)
    except OSError as error:
        raise CheckpointError(f"{Path(path).name}: {error.strerror or error}") from None


def load_calibration(path: str | os.PathLike) -> Calibration:
    """Read a calibration file.

    Raises:
        CheckpointError: not a calibration, or one whose parts do not fit each other.
    """
    with FileSource(Path(path)) as source:
        text = source.header.metadata.get(KEY)
        if text is None:
            raise CheckpointError(f"{source.name}: not a calibration of FewBits")
        try:
            return replace(_read_table(source, parse(text)), files=source.files)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{source.name}: a damaged calibration: {error!r}") from None


def _read_table(source: FileSource, table: dict) -> Calibration:
    if table["version"] != VERSION:
        raise CheckpointError(
            f"{source.name}: a calibration of version {shown(table['version'])}; "
            f"this FewBits reads {VERSION}"
        )
    inputs = [_read(source, number, facts) for number, facts in enumerate(table["inputs"])]
    layers = {}
    for name, (index, rows, size) in table["layers"].items():
        layers[name] = _whole(index), _whole(rows), _whole(size)
        if index >= len(inputs) or size != inputs[index].size:
            raise ValueError(f"layer {shown(name)} and inputs differ")
    return Calibration(layers, inputs, read_effects(table.get("effects", {})))


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ValueError(f"{shown(value)} is no count")
    return value


def _read(source: FileSource, number: int, facts: dict) -> InputStatistics:
    size, start = _whole(facts["size"]), f"input.{number}."
    tensors = {
        name[len(start) :]: source.read(name)
        for name in source.header.tensors
        if name.startswith(start)
    }
    for name, tensor in tensors.items():
        _refuse_misfit(source.name, start + name, tensor, size)
    first, second = (
        _read_half(tensors, index, _whole(count)) for index, count in enumerate(facts["counts"])
    )
    statistics = InputStatistics(
        size=size,
        capacity=_whole(facts["capacity"]),
        total=tensors.get("total"),
        square=tensors.get("square"),
        largest=tensors.get("largest"),
        damaged=_whole(facts["damaged"]),
        halves=(first, second),
    )
    missing = _missing(statistics)
    if missing:
        raise ValueError(f"'{start}{missing}' is missing")
    return statistics


def _missing(statistics: InputStatistics) -> str | None:
    """What it does not have of what was counted."""
    if not statistics.count:
        return None
    for name in ("total", "square", "largest"):
        if getattr(statistics, name) is None:
            return name
    for index, half in enumerate(statistics.halves):
        kept = half.gram is not None if statistics.exact else half.held > 0
        if half.count and not kept:
            return f"{index}.{'gram' if statistics.exact else 'rows'}"
    return None


def _read_half(tensors: dict[str, torch.Tensor], index: int, count: int) -> Half:
    rows = tensors.get(f"{index}.rows")
    return Half(count, tensors.get(f"{index}.gram"), [] if rows is None else [rows])


def _refuse_misfit(file: str, name: str, tensor: torch.Tensor, size: int) -> None:
    wanted = {"gram": (torch.float32, 2), "rows": (torch.bfloat16, 2)}
    dtype, dims = wanted.get(name.rpartition(".")[2], (torch.float32, 1))
    square = name.endswith(".gram") and tensor.shape[0] != size
    if tensor.dtype != dtype or tensor.dim() != dims or tensor.shape[-1] != size or square:
        raise CheckpointError(
            f"{file}: '{name}' is {tensor.dtype} {list(tensor.shape)}, which does not fit K={size}"
        )
