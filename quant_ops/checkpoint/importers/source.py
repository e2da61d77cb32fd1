"""A foreign file as a TensorSource in canonical form: same pipeline, same planner, one layer in
memory at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain

import torch

from ...errors import CheckpointError, RecipeError
from ...formats import FORMATS
from ...sources import TORCH_DTYPES, TensorSource
from ...spec import FLOAT_DTYPES, Header, TensorSpec
from ...strict_json import parse
from ..diffusers import renamed
from ..host_layers import host_layer, is_bank
from ..labels import EMBEDDING
from ..metadata import HEADER_KEY, markers_in, read_marker
from ..open import open_file
from ..reader import stored_text
from ..scales import scale_problem
from . import explained, translate
from .base import CODES, FP8, FileFacts, ImportOptions, StoredLayer, Translation
from .damage import damage
from .quanto import PACKED
from .unread import is_companion, tool_of

LEGACY_MARKER = "scaled_fp8"
CODE_DTYPES = ("I8", "U8")  # FP8 is what plain casts hold too, ComfyUI reads it as numbers
NAMED = 3  # tensors that one message names
# Side tensors by suffix, beside those of our formats; those of NESTED also appear as
# `<base>.weight.<name>`.
SIDES = frozenset({
    "comfy_quant", "input_scale", "pre_quant_scale", "weight_scalar", "weight_correction",
    "scale_weight", "scale_input", "quant_map", "nested_absmax", "nested_quant_map", "weight_zeros",
    "SCB", "weight_format", "output_scale", "weight_zero_point", "weight_scale_inv", "weight_shape",
    "weight_global_scale", "input_global_scale", "weight_g_idx", "input_zero_point",
})  # fmt: skip
NESTED = frozenset({
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "_data", "_scale", "_shift",
})  # fmt: skip
# Side tensors only beside a `qweight`: elsewhere such names mean something else.
BESIDE_QWEIGHT = frozenset({
    "qzeros", "scales", "scaled_zeros", "g_idx", "wscales", "wzeros", "wtscale", "wcscales",
    "smooth_factor", "smooth_factor_orig", "smooth", "smooth_orig", "proj_down", "proj_up",
    "lora_down", "lora_up",
})  # fmt: skip
STATE = ".quant_state."
# Prefixes that ComfyUI strips from diffusion models; a header may have been written without.
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
    "transformer.",
)
CONVERTERS = (
    "formats",
    "bnb_quant_type",
)  # header keys of the converters that packed the low nibble first


@dataclass(frozen=True)
class Contents:
    """A file sorted into layers, tensors of their own, side tensors without a weight, and what it
    says as a whole.
    """

    layers: dict[str, StoredLayer]
    loose: tuple[TensorSpec, ...]
    orphans: tuple[TensorSpec, ...]
    scopes: dict[str, str]  # key of each scaled_fp8 marker -> prefix
    header_order: tuple[str, ...]
    warnings: tuple[str, ...]
    header_problem: str | None = None
    unresolved: tuple[str, ...] = ()  # names in the file header that no weight has
    missing_prefix: str = ""  # what its names lack


def read_contents(source: TensorSource) -> Contents:
    """Sort a file; reads JSON tensors only."""
    header = source.header
    names = header.tensors
    weights = _weights(names)
    packed = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    tiled = {base for base in packed if f"{base}.wscales" in names}  # whose biases are, too
    grouped: dict[str, dict[str, TensorSpec]] = {}
    loose, orphans, scopes = [], [], {}
    for name, spec in names.items():
        if name == LEGACY_MARKER or name.endswith(f".{LEGACY_MARKER}"):
            scopes[name] = name[: -len(LEGACY_MARKER)]
            continue
        base, suffix = split_name(name, packed)
        if name.removesuffix(".bias") in tiled:
            base, suffix = name.removesuffix(".bias"), "bias"
        if suffix is None:
            loose.append(spec)
        elif base in weights:
            grouped.setdefault(base, {})[suffix] = spec
        else:
            orphans.append(spec)
    markers, problem, converters = _header_layers(header.metadata)
    markers, unresolved, prefix = _resolve_names(markers, weights)
    moved = [f"header names lack the prefix '{prefix}'"] if prefix else []
    warnings = [*header.warnings, *([problem] if problem else []), *moved]
    facts = FileFacts({prefix: names[key].numel for key, prefix in scopes.items()}, converters)
    layers = {}
    for base, specs in grouped.items():
        layer = _stored_layer(source, base, specs, facts, header_marker=markers.get(base))
        if (
            layer.header_marker
            and layer.tensor_marker
            and layer.header_marker != layer.tensor_marker
        ):
            warnings.append(
                f"layer '{base}': header/tensor mismatch: the header's JSON is used, as ComfyUI "
                "does"
            )
        layers[base] = layer
    order = tuple(base for base in markers if base in layers)
    return Contents(
        layers,
        tuple(loose),
        tuple(orphans),
        scopes,
        header_order=order,
        warnings=tuple(warnings),
        header_problem=problem,
        unresolved=tuple(unresolved),
        missing_prefix=prefix,
    )


def _weights(names: Iterable[str]) -> set[str]:
    """Base names of everything that stores a weight, under whatever suffix."""
    found = set()
    for name in names:
        for suffix in CODES:
            if name.endswith(f".{suffix}"):
                found.add(name[: -len(suffix) - 1])
    return found


def split_name(name: str, packed: Container[str] = ()) -> tuple[str, str | None]:
    """`a.b.weight_scale` -> ("a.b", "weight_scale"); the suffix is None for a tensor that belongs
    to no weight.

    Args:
        packed: base names that have a `qweight`, whose side tensors have names of their own.
    """
    head, state, tail = name.partition(STATE)
    if state:
        base = head.removesuffix(".weight")
        return base, f"{head[len(base) + 1 :]}{'.' if base != head else ''}quant_state.{tail}"
    if name.endswith(f".{PACKED}"):
        return name.removesuffix(f".{PACKED}"), PACKED
    base, _, suffix = name.rpartition(".")
    if not base:
        return name, None
    if suffix in NESTED and base.endswith(".weight"):
        return base.removesuffix(".weight"), f"weight.{suffix}"
    known = suffix in CODES or suffix in SIDES
    if known or any(suffix in format.dtypes for format in FORMATS.values()):
        return base, suffix
    if suffix in BESIDE_QWEIGHT and base in packed:
        return base, suffix
    return name, None


def is_side(name: str) -> bool:
    """Whether a tensor's name alone says that some layer is quantized."""
    return split_name(name)[1] not in (None, "weight") or name.rpartition(".")[2] == LEGACY_MARKER


def _header_layers(metadata: dict[str, str]) -> tuple[dict[str, dict], str | None, bool]:
    """(base -> JSON, what is wrong, whether such converters wrote it)."""
    text = metadata.get(HEADER_KEY)
    if text is None:
        return {}, None, False
    try:
        parsed = parse(text)
        if isinstance(parsed, dict) and "layers" not in parsed and {*CONVERTERS} & {*parsed}:
            return {}, None, True
        return markers_in(parsed), None, False
    except ValueError as error:
        return (
            {},
            f"metadata {HEADER_KEY} cannot be read ({error}); the layers' own JSON is used",
            False,
        )


def _resolve_names(
    markers: dict[str, dict], weights: set[str]
) -> tuple[dict[str, dict], list[str], str]:
    """(markers under full names, names that no weight has, the prefix that was missing)."""
    missing = [base for base in markers if base not in weights]
    if not missing:
        return markers, [], ""
    moved = [(_under(prefix, markers), prefix) for prefix in PREFIXES]
    fitting = [(names, prefix) for names, prefix in moved if names.keys() <= weights]
    if len(fitting) == 1:
        names, prefix = fitting[0]
        return names, [], prefix
    return {base: marker for base, marker in markers.items() if base in weights}, missing, ""


def _under(prefix: str, markers: dict[str, dict]) -> dict[str, dict]:
    return {prefix + base: marker for base, marker in markers.items()}


def _stored_layer(
    source: TensorSource,
    base: str,
    specs: dict[str, TensorSpec],
    facts: FileFacts,
    header_marker: dict | None,
) -> StoredLayer:
    def read(suffix: str) -> torch.Tensor:
        return source.read(f"{base}.{suffix}")

    part_of = getattr(source, "sample", source.read)

    def sample(suffix: str) -> torch.Tensor:
        return part_of(f"{base}.{suffix}")

    tensor_marker, unreadable = None, None
    if "comfy_quant" in specs:
        try:
            tensor_marker = read_marker(stored_text(source, f"{base}.comfy_quant"))
        except (ValueError, CheckpointError) as error:
            unreadable = str(error)
    bias = source.header.tensors.get(f"{base}.bias")
    return StoredLayer(
        name=base,
        specs=specs,
        read=read,
        file=facts,
        header_marker=header_marker,
        tensor_marker=tensor_marker,
        unreadable=unreadable if header_marker is None else None,
        bias=bias.shape[0] if bias is not None and len(bias.shape) == 1 else None,
        sample=sample,
    )


Retarget = Callable[[Translation], Translation]


class ImportedSource:
    """A source whose quantized layers are canonical, or whatever `retarget` makes of them.

    `translations` maps base names to what becomes of each quantized layer, in the order of the
    file's own header. Reading a layer's first tensor translates all of it; the pipeline reads layer
    by layer.

    Raises:
        CheckpointError: a layer that cannot be read without guessing, or one file with both nibble
            orders.
    """

    def __init__(
        self,
        source: TensorSource,
        options: ImportOptions | None = None,
        retarget: Retarget | None = None,
    ):
        self.source, self.name = source, source.name
        self.options = options or ImportOptions()
        self.files = (*source.files, *self.options.files)
        self.contents = read_contents(source)
        found = {base: self._translate(layer) for base, layer in self.contents.layers.items()}
        order = dict.fromkeys((*self.contents.header_order, *found))
        self.translations = {base: found[base] for base in order if found[base] is not None}
        _refuse_mixed_nibbles(self.translations)
        _refuse_idle(self.name, self.options, self.translations.values())
        self.canonical = dict(self.translations)
        if retarget is not None:
            self.translations = {base: retarget(made) for base, made in self.translations.items()}
        self._owners: dict[str, tuple[str, str]] = {}
        self._cached: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.header = self._header()

    def _translate(self, layer: StoredLayer) -> Translation | None:
        if layer.name in self.options.left:
            return None
        again = layer.name in self.options.decoded
        whole = again or is_misplaced_table(layer)
        options = replace(self.options, foreign_only=False) if whole else self.options
        try:
            made = translate(layer, options)
        except CheckpointError as error:
            raise error.at(f"{self.name}: layer '{layer.name}'") from None
        if made is not None and again:
            return made.exactly("read as a float weight")
        return made and as_loadable(layer.name, made)

    def _header(self) -> Header:
        tensors: dict[str, TensorSpec] = {}
        for base, made in self.translations.items():
            for suffix, (dtype, shape) in made.outputs.items():
                name = f"{base}.{suffix}"
                tensors[name] = TensorSpec(name, dtype, shape)
                self._owners[name] = (base, suffix)
        kept = (*self.contents.loose, *(self.contents.orphans if self.options.foreign_only else ()))
        untouched = []
        for base, layer in self.contents.layers.items():
            if base not in self.translations:
                untouched += layer.specs.values()
        for spec in (*untouched, *kept):
            tensors[spec.name] = replace(spec, dtype="BF16") if self._is_cast(spec) else spec
        markers = {
            base: made.marker for base, made in self.translations.items() if made.marker is not None
        }
        for base, layer in self.contents.layers.items():
            if base not in self.translations and layer.marker is not None:
                markers[base] = layer.marker
        metadata = {
            key: value for key, value in self.source.header.metadata.items() if key != HEADER_KEY
        }
        if markers:
            metadata[HEADER_KEY] = json.dumps({"format_version": "1.0", "layers": markers})
        left = self.options.left & set(self.contents.layers)
        return Header(tensors, metadata, {}, tuple(self._warnings()), left=left)

    def _is_cast(self, spec: TensorSpec) -> bool:
        """FP8 biases and norms of scaled files: old scripts cast them along, and ComfyUI has no
        scale for them.
        """
        if spec.name.rpartition(".")[0] in self.options.left:
            return False
        return spec.dtype in FP8 and (
            not self.options.foreign_only or self._scope(spec.name) is not None
        )

    def _scope(self, name: str) -> str | None:
        return next(
            (prefix for prefix in self.contents.scopes.values() if name.startswith(prefix)), None
        )

    def _warnings(self) -> Iterable[str]:
        yield from self.contents.warnings
        said = (made.warnings for made in self.translations.values())
        yield from dict.fromkeys(chain(*said))
        decoded = [
            base for base, made in self.translations.items() if self._loses_codes(base, made)
        ]
        if decoded and self.options.foreign_only:
            yield (
                f"{len(decoded)} layers are decoded from codes of other tools ('{decoded[0]}'): "
                "what is quantized from them is rounded a second time"
            )
        if not self.options.foreign_only:
            yield from (
                f"'{spec.name}' dropped: it belongs to no weight" for spec in self.contents.orphans
            )

    def _loses_codes(self, base: str, made: Translation) -> bool:
        """Whether a matrix of codes becomes a float weight; those that are to be quantized again
        are told elsewhere.
        """
        weight = self.contents.layers[base].weight
        codes = weight.dtype not in FLOAT_DTYPES and len(weight.shape) == 2
        return codes and made.is_float and base not in self.options.decoded

    def origins(self) -> dict[str, int]:
        """Dialect and what becomes of it -> number of layers; empty for a file in canonical
        form.
        """
        counts: dict[str, int] = origins_of(self.source)
        for made in self.translations.values():
            if made.note:
                text = f"{made.dialect}: {made.note}"
                counts[text] = counts.get(text, 0) + 1
        return counts

    @property
    def stock(self) -> bool:
        """Whether ComfyUI reads every layer rightly that is translated here."""
        layers = self.contents.layers
        return not self.contents.header_problem and all(
            made.stock and not layers[base].unreadable
            for base, made in self.translations.items()
            if made.note
        )

    @property
    def changes_nothing(self) -> bool:
        """Whether every tensor would come out as it went in."""
        return (
            not self.contents.scopes
            and not self.contents.missing_prefix
            and not self.contents.header_problem
            and not self.translations
            and all(not self._is_cast(spec) for spec in self.contents.loose)
        )

    def layer(self, base: str) -> dict[str, torch.Tensor]:
        """All canonical tensors of a layer by suffix."""
        stored = self.contents.layers[base]
        tensors = {suffix: stored.read(suffix) for suffix in stored.specs}
        where = f"{self.name}: layer '{base}'"
        problem = scale_problem(tensors)
        if problem:
            raise CheckpointError(f"{where}: {problem}; the file is damaged: get a good copy")
        try:
            return self.translations[base].convert(tensors)
        except (RuntimeError, IndexError) as error:  # tensors that torch cannot bring together
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{where} cannot be decoded: {reason}") from error

    def read(self, name: str) -> torch.Tensor:
        if name not in self._owners:
            return self.source.read(name).to(TORCH_DTYPES[self.header.tensors[name].dtype])
        base, suffix = self._owners[name]
        if self._cached[0] != base or suffix not in self._cached[1]:
            self._cached = (base, self.layer(base))
        # each tensor is read once; what was handed out is not held here
        return self._cached[1].pop(suffix)

    def close(self) -> None:
        close = getattr(self.source, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> ImportedSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def origins_of(source: TensorSource) -> dict[str, int]:
    """What a source itself decodes, such as the blocks of a GGUF file -> number of tensors."""
    origins = getattr(source, "origins", None)
    if origins is not None:
        return dict(origins())
    return {}


def as_loadable(base: str, made: Translation) -> Translation:
    """Embedding tables in formats that ComfyUI cannot load there are decoded: it would read codes
    as numbers.
    """
    if is_unreadable_table(base, made.format):
        return made.decoded(made.float_dtype, f"embedding table in {made.format}: decoded")
    return made


def is_misplaced_table(layer: StoredLayer) -> bool:
    """Whether a layer's JSON says a format that ComfyUI does not look up rows in."""
    name = layer.said.get("format")
    return isinstance(name, str) and is_unreadable_table(layer.name, name)


def is_unreadable_table(base: str, format: str | None) -> bool:
    """Whether this is an embedding table in a format that ComfyUI does not look up rows in."""
    known = format in FORMATS and EMBEDDING.fullmatch(base) is not None
    return known and FORMATS[format].embedding_min_comfyui is None


def unexplained(contents: Contents) -> tuple[str, ...]:
    """Codes that no dialect explains, and what stands beside codes and changes their meaning: one
    text each. Read as numbers, or without it, they are noise.
    """
    names = {spec.name for spec in (*contents.loose, *contents.orphans)}
    found = []
    for spec in contents.loose:
        codes = spec.dtype in CODE_DTYPES and len(spec.shape) > 1
        tool = tool_of(spec, names)
        if tool:
            found.append(f"{_shown(spec)} of {tool}")
        elif codes or _beside_codes(spec, contents.layers, names):
            found.append(_shown(spec))
    layers = (layer for layer in contents.layers.values() if not explained(layer))
    return (*found, *(_shown(layer.weight) for layer in layers))


def _shown(spec: TensorSpec) -> str:
    return f"'{spec.name}' {spec.dtype} {list(spec.shape)}"


def _beside_codes(spec: TensorSpec, layers: Mapping[str, StoredLayer], names: set[str]) -> bool:
    """Whether a tensor scales codes in a way that nothing here reads, or is codes that one does."""
    base, _, suffix = spec.name.rpartition(".")
    layer = layers.get(base.removesuffix(".weight"))
    if layer is not None and is_companion(suffix):
        return layer.weight.dtype not in FLOAT_DTYPES and len(layer.weight.shape) > 1
    if spec.dtype not in FP8 or len(spec.shape) < 2:
        return False
    behind = (name.removeprefix(spec.name) for name in names if name.startswith(spec.name))
    return any(map(is_companion, filter(None, behind)))


def refuse_unexplained(name: str, contents: Contents) -> None:
    """
    Raises:
        CheckpointError: the file holds codes that nothing here reads.
    """
    found = unexplained(contents)
    if found:
        named = ", ".join(found[:NAMED])
        raise CheckpointError(
            f"{name}: {len(found)} tensors hold codes of a format that is not read, or scale them "
            f"({named}); start from the original model"
        )


def refuse_damaged(name: str, contents: Contents) -> None:
    """
    Raises:
        CheckpointError: a layer whose codes or scales cannot be what they are said to be, as far as
            a glance shows.
    """
    for layer in contents.layers.values():
        made = readable(layer)
        problem = made and damage(layer, made)
        if problem:
            raise CheckpointError(
                f"{name}: layer '{layer.name}': {problem}; the file is damaged: get a good copy, "
                "or start from the original model"
            )


def readable(layer: StoredLayer) -> Translation | None:
    """What becomes of a quantized layer; None for any other, for a bank of experts, and for one
    that is refused anyway.
    """
    bank = host_layer(layer.said, layer.specs) is not None and is_bank(layer.said)
    try:
        return None if bank else translate(layer, ImportOptions())
    except CheckpointError:
        return None


IDLE = {
    "assume": "what 4-bit layers are was said, and no layer leaves it open",
    "assume_convrot": "a rotation was said, and no INT8 layer leaves it open",
    "nibble_order": "a nibble order was said, and no layer leaves it open",
}


def _refuse_idle(name: str, options: ImportOptions, made: Iterable[Translation]) -> None:
    """Refuse what the user said to no effect: they believe that it had one."""
    asked = set().union(*(translation.asked for translation in made))
    for option, why in IDLE.items():
        if getattr(options, option) is not None and option not in asked:
            raise RecipeError(f"{name}: {why}", option=option)


def _refuse_mixed_nibbles(translations: dict[str, Translation]) -> None:
    """One file has one nibble order."""
    orders = {made.nibbles: base for base, made in translations.items() if made.nibbles}
    if len(orders) > 1:
        raise CheckpointError(
            f"layer '{orders['low']}' stores the low nibble first and layer '{orders['high']}' the "
            "high one; one file has one order: say which, or make the file again",
            option="nibble_order",
        )


def imported(source: TensorSource, options: ImportOptions | None = None) -> TensorSource:
    """The source itself when nothing in it is to be translated, else its translation; the caller
    closes either.
    """
    if not any(is_side(name) or spec.dtype in FP8 for name, spec in source.header.tensors.items()):
        return source
    made = ImportedSource(source, options)
    if made.changes_nothing:
        return source
    return made


def open_checkpoint(
    path: str | os.PathLike,
    *,
    short_lived: bool = False,
    for_gpu: bool = False,
    decoded: frozenset[str] = frozenset(),
) -> TensorSource:
    """A file, index or folder of shards, foreign layers in canonical form, and everything under
    ComfyUI's names; a context manager that closes the files.

    `short_lived` and `for_gpu` as FileSource defines them, `decoded` as ImportOptions does.

    Raises:
        CheckpointError: see FileSource and ImportedSource.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_file(path, short_lived=short_lived, for_gpu=for_gpu))
        contents = read_contents(file)
        refuse_unexplained(file.name, contents)
        refuse_damaged(file.name, contents)
        opened = renamed(imported(file, ImportOptions(foreign_only=True, decoded=decoded)))
        stack.pop_all()
        return opened
