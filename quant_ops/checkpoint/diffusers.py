"""A model under diffusers' names as a TensorSource under ComfyUI's: renamed, rows put together,
halves changed places; recipes/diffusers.toml says which.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..formats import Arrangement, Format, get_format
from ..sources import TensorSource
from ..spec import Header, LayerInput, TensorSpec
from .labels import labels
from .metadata import HEADER_KEY, header_markers, parse_marker
from .reader import stored_text

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

TABLES = Path(__file__).parent.parent / "recipes" / "diffusers.toml"
DIFFUSERS = "diffusers'"
SHARED = "tables"  # the table of diffusers.toml that is no model
HEAD = 64  # rows of a transformer block's width
NAMED = 3  # tensors that one warning names
# How much of a file ComfyUI may leave out for lack of a name. `time_embedding.cond_proj` of LCM is
# .0001 of a UNet; the guidance of Chroma and the captions of FIBO are over .01 of them.
LEFT_OUT = 0.001
MARKER = ".comfy_quant"
SCALE = "weight_scale"


@dataclass(frozen=True)
class Place:
    """Where a layer goes: which of `of` pieces of `target` it is, by rows or by columns, whether
    its halves change places, and, of a layer that becomes several, the others (`more`).
    """

    target: str
    index: int = 0
    of: int = 1
    swapped: bool = False
    columns: bool = False
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Everything below one prefix: a name there -> its place below `to`."""

    start: re.Pattern
    to: str
    places: Mapping[str, Place]


class Names:
    """The names of one kind of model, as a header has them."""

    def __init__(self, model: str, tensors: Mapping[str, TensorSpec]):
        table = _tables()[model]
        self.title, self.others = table["title"], table.get("others", False)
        self.tool = table.get("tool", DIFFUSERS)
        self._tensors = tensors
        self._known: dict[str, int] = {}
        if "last" in table:
            self._known["last"] = tensors[table["last"]].shape[0] // HEAD - 1
        if "count" in table:
            self._known["r"] = _count(table["count"], tensors)
        self._behind = table.get("behind", "")
        self._blocks = [self._block(block) for block in table["block"]]

    @property
    def read_by_comfyui(self) -> bool:
        """Whether ComfyUI knows them too, where nothing is quantized."""
        return self.tool == DIFFUSERS

    def place(self, name: str) -> Place | None:
        """Where a layer or a tensor goes; None for one that is not named. Later blocks count
        first.
        """
        for block in reversed(self._blocks):
            start = block.start.match(name)
            if start is None or name[start.end() :] not in block.places:
                continue
            found = block.places[name[start.end() :]]
            to = block.to.format(**self._numbers(start.groupdict()))
            more = tuple(to + other for other in found.more)
            return replace(found, target=to + found.target, more=more)
        return None

    def _block(self, block: dict) -> Block:
        start = block["from"]
        for name, value in self._known.items():
            start = start.replace(f"{{{name}}}", str(value))
        pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>[0-9]{1,4})", re.escape(start))
        shared = _tables()[SHARED].get(block.get("table", ""), {})
        places = {}
        for group in (shared, block):
            for name, target in group.get("names", {}).items():
                places[name] = Place(target)
            for name, target in group.get("swapped", {}).items():
                places[name] = Place(target, swapped=True)
            for target, pieces in group.get("rows", {}).items():
                for index, name in enumerate(pieces):
                    places[name] = Place(target, index, len(pieces))
            for target, pieces in group.get("columns", {}).items():
                for index, name in enumerate(pieces):
                    places[name] = Place(target, index, len(pieces), columns=True)
            for name, targets in group.get("parts", {}).items():
                places[name] = Place(targets[0], more=tuple(targets[1:]))
        return Block(re.compile(pattern), block["to"], places)

    def _numbers(self, found: Mapping[str, str]) -> dict[str, int]:
        """The numbers of a name, and those that follow from them: blocks of a UNet are counted
        through, with `r` of them and a sampler on each level.
        """
        numbers = {**self._known, **{name: int(text) for name, text in found.items()}}
        if "x" not in numbers:
            return numbers
        level, r = numbers["x"], self._known["r"]
        first, inside = (r + 1) * level, numbers.get("i", 0)
        attended = self._behind.format(x=level, r=r) in self._tensors
        return {
            **numbers,
            "down": 1 + first + inside,
            "downsampler": first + r + 1,
            "up": first + inside,
            "upsampler": first + r,
            "behind": 2 if attended else 1,
        }


@cache
def _tables() -> dict:
    return tomllib.loads(TABLES.read_text(encoding="utf-8"))


def _count(pattern: str, tensors: Mapping[str, TensorSpec]) -> int:
    count = 0
    while pattern.format(r=count) in tensors:
        count += 1
    return count


def names_of(tensors: Mapping[str, TensorSpec]) -> Names | None:
    """The names of diffusers that a file is written in; None for any other file."""
    for model, table in _tables().items():
        if model != SHARED and all(key in tensors for key in table["keys"]):
            return Names(model, tensors)
    return None


def renamed(source: TensorSource) -> TensorSource:
    """The source under ComfyUI's names; itself where it has them already. The caller closes either.

    Raises:
        CheckpointError: pieces of a layer are missing, or cannot be put together exactly.
    """
    names = names_of(source.header.tensors)
    if names is None:
        return source
    return RenamedSource(source, names)


Piece = dict[str, TensorSpec]  # the tensors of one layer of the file, by suffix


class RenamedSource:
    """See `renamed`. `header` has no side tensor that says how a layer is quantized: its metadata
    does.
    """

    def __init__(self, source: TensorSource, names: Names):
        self.source, self.name, self.files = source, source.name, source.files
        self._names = names
        self._markers = _markers(source)
        self._reads: dict[str, Callable[[], torch.Tensor]] = {}
        self._tensors: dict[str, TensorSpec] = {}
        self._made: dict[str, dict] = {}
        self._whole: tuple[str, torch.Tensor | None] = ("", None)
        left_out: list[TensorSpec] = []
        groups: dict[str, dict[int, tuple[str, Place, Piece]]] = {}
        for base, piece in self._pieces().items():
            place = names.place(base) or (Place(base) if names.others else None)
            if place is None:
                left_out += piece.values()
                continue
            group = groups.setdefault(place.target, {})
            if place.index in group:
                raise self._refusal(place.target, f"two layers stand for it: '{base}' is one")
            group[place.index] = (base, place, piece)
        self._refuse_another_model(left_out)
        for target, group in groups.items():
            self._put(target, [group[index] for index in sorted(group)])
        self.header = Header(self._tensors, self._metadata(), {}, tuple(self._warnings(left_out)))

    def read(self, name: str) -> torch.Tensor:
        return self._reads[name]()

    def origins(self) -> dict[str, int]:
        """What was renamed -> number of tensors."""
        inner = getattr(self.source, "origins", None)
        counts = dict(inner()) if inner is not None else {}
        tool, title = self._names.tool, self._names.title
        return {**counts, f"{tool} names ({title}): ComfyUI's": len(self._tensors)}

    def close(self) -> None:
        close = getattr(self.source, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> RenamedSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _pieces(self) -> dict[str, Piece]:
        """The file's layers; a tensor that is named as a whole is one of its own, without
        suffix.
        """
        pieces: dict[str, Piece] = {}
        for name, spec in self.source.header.tensors.items():
            base, _, suffix = name.rpartition(".")
            if not base or self._names.place(name) is not None:
                base, suffix = name, ""
            if suffix != MARKER[1:] or base not in self._markers:
                pieces.setdefault(base, {})[suffix] = spec
        return pieces

    def _put(self, target: str, found: list[tuple[str, Place, Piece]]) -> None:
        """One layer of the result."""
        bases = [base for base, _, _ in found]
        pieces = [piece for _, _, piece in found]
        place = found[0][1]
        if len(found) != place.of:
            raise self._refusal(
                target, f"it is made of {place.of} layers and the file has {', '.join(bases)} only"
            )
        quantized = [base for base in bases if base in self._markers]
        if quantized:
            if len(quantized) < len(bases) or place.swapped or place.columns or place.more:
                raise self._refusal(
                    target, f"'{quantized[0]}' is quantized, which allows no exact conversion"
                )
            self._put_codes(target, bases, pieces)
            return
        suffixes = dict.fromkeys(chain(*pieces))
        for suffix in suffixes:
            if place.columns:
                self._put_columns(target, suffix, pieces)
                continue
            specs = self._all(target, suffix, pieces)
            if place.more:
                self._put_parts((target, *place.more), suffix, specs[0])
            else:
                self._add(target, suffix, _joined(specs), self._plain(specs, place.swapped))

    def _put_columns(self, target: str, suffix: str, pieces: list[Piece]) -> None:
        """Layers whose outputs are added: columns of one weight, and the sum of the biases."""
        specs = [piece[suffix] for piece in pieces if suffix in piece]
        kinds = {(spec.dtype, spec.shape[:1]) for spec in specs}
        ranks = {"weight": 2, "bias": 1}
        alike = len(specs) == len(pieces) and len(kinds) == 1
        if not alike or {len(spec.shape) for spec in specs} != {ranks.get(suffix)}:
            raise self._refusal(target, f"'{suffix}' of its pieces cannot be put side by side")
        shape = specs[0].shape
        if suffix == "weight":
            shape = (shape[0], sum(spec.shape[1] for spec in specs))

        def read() -> torch.Tensor:
            tensors = [self.source.read(spec.name) for spec in specs]
            if suffix == "weight":
                return torch.cat(tensors, 1)
            return sum(tensor.float() for tensor in tensors).to(tensors[0].dtype)

        self._add(target, suffix, (specs[0].dtype, shape), read)

    def _put_parts(self, targets: tuple[str, ...], suffix: str, spec: TensorSpec) -> None:
        """A layer whose rows are those of several, as many of each."""
        if not spec.shape or spec.shape[0] % len(targets):
            raise self._refusal(targets[0], f"'{spec.name}' {list(spec.shape)} has no equal parts")
        rows = spec.shape[0] // len(targets)
        for index, target in enumerate(targets):
            self._add(
                target,
                suffix,
                (spec.dtype, (rows, *spec.shape[1:])),
                functools.partial(self._part, spec.name, index, rows),
            )

    def _part(self, name: str, index: int, rows: int) -> torch.Tensor:
        if self._whole[0] != name:  # its parts are read one after the other
            self._whole = (name, self.source.read(name))
        return self._whole[1][index * rows : (index + 1) * rows]

    def _put_codes(self, target: str, bases: list[str], pieces: list[Piece]) -> None:
        """A quantized layer: the rows of several, where their scales allow it exactly."""
        markers = [self._markers[base] for base in bases]
        name = markers[0].get("format")
        if len({marker.get("format") for marker in markers}) > 1:
            raise self._refusal(target, "its pieces have different formats")
        format = get_format(name)
        lifted = len(pieces) > 1 and self._scales_differ(pieces)
        options = [format.options_from(*pair) for pair in zip(markers, pieces, strict=True)]
        layers = [format.stored_layer(*pair) for pair in zip(markers, pieces, strict=True)]
        if len(set(options)) > 1 or len({layer.shape[1] for layer in layers}) > 1:
            raise self._refusal(target, "its pieces are quantized with different options")
        chosen = options[0]
        if lifted:
            a_row = _with_a_scale_a_row(format)
            if a_row is None:
                raise self._refusal(target, f"its pieces have scales of their own in {name}")
            format = a_row
            precise = chosen.full_precision_matrix_mult
            stated = {"scaling": "row", "full_precision_matrix_mult": precise}
            chosen = format.configure(stated)
        rows = sum(layer.shape[0] for layer in layers)
        layer = LayerInput((rows, layers[0].shape[1]), layers[0].dtype)
        wanted = format.tensor_specs(layer, chosen)
        others = set().union(*pieces) - {*wanted, "bias"}
        for suffix in ("bias", *wanted, *sorted(others)):
            if suffix == "bias" and not any("bias" in piece for piece in pieces):
                continue
            specs = self._all(target, suffix, pieces)
            if lifted and suffix == SCALE:
                read = self._scale_a_row(specs, layers, wanted[SCALE][1])
                made = wanted[SCALE]
            elif suffix == "bias" or _fits(specs, wanted.get(suffix)):
                made, read = _joined(specs), self._plain(specs, False)
            elif suffix not in wanted or specs[0].shape == wanted[suffix][1]:
                made, read = (specs[0].dtype, specs[0].shape), self._shared(target, specs)
            else:
                raise self._refusal(target, f"'{suffix}' of its pieces cannot be put together")
            self._add(target, suffix, made, read)
        self._made[target] = format.marker(layer, chosen)

    def _scales_differ(self, pieces: list[Piece]) -> bool:
        scales = [piece.get(SCALE) for piece in pieces]
        if any(spec is None or spec.numel != 1 for spec in scales):
            return False
        values = [float(self.source.read(spec.name).float().item()) for spec in scales]
        return len(set(values)) > 1

    def _scale_a_row(
        self, specs: list[TensorSpec], layers: list[LayerInput], shape: tuple[int, ...]
    ) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            pairs = zip(specs, layers, strict=True)
            scales = [
                self.source.read(spec.name).float().reshape(1, 1).expand(layer.shape[0], 1)
                for spec, layer in pairs
            ]
            return torch.cat(scales).reshape(shape)

        return read

    def _plain(self, specs: list[TensorSpec], swapped: bool) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            tensors = [self.source.read(spec.name) for spec in specs]
            if swapped:
                first, second = tensors[0].chunk(2)
                return torch.cat([second, first])
            if len(tensors) == 1:
                return tensors[0]
            return torch.cat(tensors)

        return read

    def _shared(self, target: str, specs: list[TensorSpec]) -> Callable[[], torch.Tensor]:
        """A tensor that all pieces have alike."""
        values = [self.source.read(spec.name) for spec in specs]
        if any(not torch.equal(value, values[0]) for value in values):
            raise self._refusal(target, f"'{specs[0].name}' differs between its pieces")
        return lambda: values[0]

    def _all(self, target: str, suffix: str, pieces: list[Piece]) -> list[TensorSpec]:
        """One tensor of every piece."""
        specs = [piece[suffix] for piece in pieces if suffix in piece]
        if len(specs) < len(pieces):
            raise self._refusal(target, f"not all of its pieces have '{suffix}'")
        kinds = {(spec.dtype, spec.shape[1:]) for spec in specs}
        if len(kinds) > 1:
            raise self._refusal(target, f"'{suffix}' of its pieces differ in dtype or width")
        return specs

    def _add(
        self,
        target: str,
        suffix: str,
        made: tuple[str, tuple[int, ...]],
        read: Callable[[], torch.Tensor],
    ) -> None:
        name = f"{target}.{suffix}" if suffix else target
        self._tensors[name] = TensorSpec(name, *made)
        self._reads[name] = read

    def _metadata(self) -> dict[str, str]:
        kept = {
            key: value for key, value in self.source.header.metadata.items() if key != HEADER_KEY
        }
        if self._made:
            kept[HEADER_KEY] = json.dumps({"format_version": "1.0", "layers": self._made})
        return kept

    def _refuse_another_model(self, left_out: list[TensorSpec]) -> None:
        """
        Raises:
            CheckpointError: too many layers have no place for the file to be such a model.
        """
        lost = [spec for spec in left_out if len(spec.shape) > 1]
        whole = sum(spec.numel for spec in self.source.header.tensors.values())
        if sum(spec.numel for spec in lost) > LEFT_OUT * whole:
            raise CheckpointError(
                f"{self.name}: {len(lost)} layers are none of {self._names.title} "
                f"({_listed(lost)}): another model under such names, which ComfyUI does not know"
            )

    def _warnings(self, left_out: list[TensorSpec]) -> Iterable[str]:
        yield from self.source.header.warnings
        if left_out:
            names = _listed(left_out)
            yield (
                f"{len(left_out)} tensors are left out, as ComfyUI knows no place for them: {names}"
            )

    def _refusal(self, target: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: layer '{target}' cannot be made: {why}")


def _listed(specs: list[TensorSpec]) -> str:
    return ", ".join(f"'{spec.name}'" for spec in specs[:NAMED])


def _markers(source: TensorSource) -> dict[str, dict]:
    """The markers of a source, whichever place says them."""
    found = header_markers(source.header.metadata)
    if found:
        return found
    names = [name for name in source.header.tensors if name.endswith(MARKER)]
    bases = {name: name.removesuffix(MARKER) for name in names}
    return {base: parse_marker(base, stored_text(source, name)) for name, base in bases.items()}


def _with_a_scale_a_row(format: Format) -> Format | None:
    """The format that holds the same codes with a scale per row; None where there is none."""
    known = labels().get(format.code_dtype, {})
    found = known.get(Arrangement.ROW) if known.get(Arrangement.TENSOR) == format.name else None
    if found:
        return get_format(found)
    return None


def _joined(specs: list[TensorSpec]) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of tensors put together by rows."""
    first = specs[0]
    if len(specs) == 1:
        return first.dtype, first.shape
    return first.dtype, (sum(spec.shape[0] for spec in specs), *first.shape[1:])


def _fits(specs: list[TensorSpec], wanted: tuple[str, tuple[int, ...]] | None) -> bool:
    """Whether tensors put together by rows are what the format stores for all of them."""
    return wanted is not None and bool(specs[0].shape) and _joined(specs)[1] == wanted[1]
