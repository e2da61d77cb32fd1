"""Mistakes that names, shapes, dtypes and JSON of one layer show, without reading its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ....kernels.hadamard import is_group_size
from ...errors import CheckpointError, RecipeError
from ...formats import FORMATS, Arrangement, get_format, read_as
from ...formats.base import params_of
from ...formats.bnb_4bit import PREFIX, Bnb4Bit
from ...spec import FLOAT_DTYPES
from ..host_layers import host_layer
from ..importers import StoredLayer
from ..importers.base import FP8, FP8_SCALES, input_scale_problem
from ..importers.flat_4bit import is_zero_defect
from ..importers.hybrid_mxfp8 import HYBRID
from ..importers.plain import OrphanMarker
from ..labels import EMBEDDING, Label, is_scaled, label_of, labels
from .findings import ORIGINAL, REPAIR, SHAPES, Finding, Mistake, findings_of

Problems = Iterable[str]
SCALES = (
    "weight_scale", "weight_scale_2", "scale_weight", "absmax", "weight.absmax", "weight_s_channel",
    "input_scale", "scale_input",
)  # fmt: skip


def is_host_layer(layer: StoredLayer) -> bool:
    """What ComfyUI reads and nothing here writes: its side tensors are not those of the formats
    here.
    """
    return host_layer(layer.said, layer.specs) is not None


# ---- JSON ----


def _unreadable_json(layer: StoredLayer) -> Problems:
    if layer.unreadable:
        yield layer.unreadable


def _differing_json(layer: StoredLayer) -> Problems:
    if layer.header_marker and layer.tensor_marker and layer.header_marker != layer.tensor_marker:
        yield f"header {layer.header_marker}, layer {layer.tensor_marker}"


def _no_format(layer: StoredLayer) -> Problems:
    said = layer.said.get("format")
    if layer.marker is not None and said is None and layer.weight.dtype not in FLOAT_DTYPES:
        yield f"{layer.marker}"


def _unknown_format(layer: StoredLayer) -> Problems:
    name = layer.said.get("format")
    known = name in FORMATS or read_as(name) is not None or is_host_layer(layer)
    if name is not None and not known:
        yield f"{name!r}"


def _misspelled(layer: StoredLayer) -> Problems:
    if layer.misspelled:
        yield f"{layer.marker['format']!r} is {layer.said['format']}"


def _orphan_marker(layer: StoredLayer) -> Problems:
    if OrphanMarker().claims(layer) and not layer.unreadable:
        yield f"weight is {layer.weight.dtype}, its JSON says {layer.said.get('format')}"


def _hybrid(layer: StoredLayer) -> Problems:
    if layer.said.get("format") == HYBRID:
        yield "weight_scalar" if "weight_scalar" in layer.specs else "the format's name"


# ---- group sizes ----


def _group_size_places(layer: StoredLayer) -> tuple[bool, bool] | None:
    """Whether the JSON states the group size (flat, nested); None where the format has no choice
    of it.
    """
    format = FORMATS.get(layer.said.get("format"))
    if format is None or "block_size" not in format.Options.names() or is_host_layer(layer):
        return None
    marker = layer.marker or {}
    return "group_size" in marker, "group_size" in params_of(marker)


def _group_size_once(layer: StoredLayer) -> Problems:
    places = _group_size_places(layer)
    if places is not None and not all(places) and not _group_size_unsaid(layer):
        yield f"{layer.marker}"


def _group_size_unsaid(layer: StoredLayer) -> bool:
    """1 x b blocks whose b stands nowhere; tiles that do not say theirs are completed silently."""
    format = FORMATS.get(layer.said.get("format"))
    grouped = format is not None and format.lacks_group_size
    return grouped and not any(_group_size_places(layer) or ())


def _group_size_missing(layer: StoredLayer) -> Problems:
    if _group_size_unsaid(layer):
        yield "no group size"


# ---- the label against the scale ----


def _relabelled(layer: StoredLayer) -> Label | None:
    """What the scale's shape means, where the stored tensors are not those of the format that the
    JSON names; None where they agree, or mean nothing.
    """
    name, scale = layer.said.get("format"), layer.specs.get("weight_scale")
    known = is_scaled(name) and layer.weight.dtype in labels() and not is_host_layer(layer)
    if not known or scale is None or len(layer.weight.shape) != 2:
        return None
    widened = {**layer.specs, "weight_scale": replace(scale, dtype="F32")}
    try:
        get_format(name).options_from(layer.said, widened)
        return None
    except (CheckpointError, RecipeError):
        pass
    size = layer.said.get("group_size")
    try:
        return label_of(layer.weight.dtype, layer.matrix, scale.shape, name, group_size=size)
    except CheckpointError:
        return None  # reported as unreadable


def _scale_shape(geometry: Arrangement) -> Callable[[StoredLayer], Problems]:
    """The right tag, and a scale of another rank than the format's."""

    def check(layer: StoredLayer) -> Problems:
        label = _relabelled(layer)
        if label is None or label.format != layer.said["format"] or label.geometry is not geometry:
            return
        shape = layer.specs["weight_scale"].shape
        if shape:
            yield f"weight_scale is {list(shape)}"

    return check


def _tag(mistake: str) -> Callable[[StoredLayer], Problems]:
    """Another tag than the scale's shape means."""

    def check(layer: StoredLayer) -> Problems:
        label = _relabelled(layer)
        tag = layer.said.get("format")
        if label is None or label.format == tag or _mislabelled(tag, label) != mistake:
            return
        shape = list(layer.specs["weight_scale"].shape)
        yield f"tag {tag}, scale {shape} means {label.format}"

    return check


def _mislabelled(tag: str, label: Label) -> str:
    tagged = get_format(tag)
    if tagged.arrangements == (Arrangement.TILE,) and label.geometry is Arrangement.ROW:
        return "blocks"
    if tagged.code_dtype == "I8":
        return "int8"
    if label.geometry is Arrangement.GROUP:
        return "group"
    return "scalar"


# ---- scales ----


def _half_scales(layer: StoredLayer) -> Problems:
    if is_host_layer(layer) or layer.codes != "weight":  # other tools' scales are theirs
        return
    half = [
        f"{suffix} {layer.specs[suffix].dtype}"
        for suffix in SCALES
        if suffix in layer.specs and layer.specs[suffix].dtype in ("BF16", "F16")
    ]
    if half:
        yield ", ".join(half)


def _input_scale(layer: StoredLayer) -> Problems:
    name = layer.said.get("format")
    if "input_scale" in layer.specs and name in FORMATS and not is_host_layer(layer):
        problem = input_scale_problem(layer, "input_scale", name)
        if problem:
            yield problem


def _missing_scale(layer: StoredLayer) -> Problems:
    codes = layer.weight.dtype in FP8 and is_scaled(layer.said.get("format"))
    if codes and layer.first(*FP8_SCALES) is None:
        yield f"{layer.weight.dtype} codes; right only if they are plain casts"


def _dummy_scale(layer: StoredLayer) -> Problems:
    if layer.weight.dtype in FLOAT_DTYPES and "scale_weight" in layer.specs:
        yield f"weight is {layer.weight.dtype}"


# ---- rotation, place, 4 bits ----


def _rotation(layer: StoredLayer) -> Problems:
    if is_host_layer(layer):
        return
    if not layer.said.get("convrot") or layer.weight.dtype != "I8" or len(layer.weight.shape) != 2:
        return
    group, scale = layer.said.get("convrot_groupsize", 256), layer.specs.get("weight_scale")
    if type(group) is not int or not is_group_size(group) or layer.matrix[1] % group:
        yield f"convrot_groupsize {group!r} for K={layer.matrix[1]}"
    elif scale is not None and scale.numel == 1 and layer.matrix[0] > 1:
        yield "rotated with one scale for the whole tensor"


def _place(layer: StoredLayer) -> Problems:
    name = layer.said.get("format")
    if name not in FORMATS or is_host_layer(layer):
        return
    if EMBEDDING.fullmatch(layer.name) and FORMATS[name].embedding_min_comfyui is None:
        yield f"embedding table in {name}"
    elif len(layer.weight.shape) != 2 and not isinstance(FORMATS[name], Bnb4Bit):
        yield f"{len(layer.weight.shape)}-D weight in {name}"


def _flat_size(layer: StoredLayer) -> int | None:
    """The group size of a 4-bit layer with absmax; None for any other layer."""
    name, size = layer.said.get("format"), layer.said.get("group_size")
    four_bit = isinstance(name, str) and name.startswith(PREFIX) and "absmax" in layer.specs
    if four_bit and type(size) is int:
        return size
    return None


def _zero_layer(layer: StoredLayer) -> Problems:
    size = _flat_size(layer)
    if size is not None and is_zero_defect(layer, size):
        yield f"weight {list(layer.weight.shape)} stored unpacked"


def _no_shape(layer: StoredLayer) -> Problems:
    size = _flat_size(layer)
    if size is not None and not is_zero_defect(layer, size) and "shape" not in layer.said:
        yield f"{2 * layer.weight.nbytes} codes"


SHAPE_MISSING = Mistake("shape-missing", "a flat 4-bit weight without its shape", SHAPES, _no_shape)
FORMAT_UNKNOWN = Mistake(
    "format-unknown", "the format is empty or unknown", ORIGINAL, _unknown_format
)
ROTATION_IMPOSSIBLE = Mistake(
    "rotation-impossible", "a rotation that cannot be undone", ORIGINAL, _rotation
)

STORED = (
    Mistake("json-unreadable", "comfy_quant is not JSON", REPAIR, _unreadable_json),
    Mistake(
        "header-differs",
        "the file header and the layer's JSON differ; the header silently wins",
        REPAIR,
        _differing_json,
    ),
    Mistake("format-missing", "the JSON has no format", REPAIR, _no_format),
    FORMAT_UNKNOWN,
    Mistake(
        "format-misspelled",
        "the format stands under a name that ComfyUI does not know",
        REPAIR,
        _misspelled,
    ),
    Mistake(
        "marker-without-codes",
        "a high-precision weight that its JSON calls quantized",
        REPAIR,
        _orphan_marker,
    ),
    Mistake("hybrid-scalar", f"{HYBRID} carries one number for many exponents", REPAIR, _hybrid),
    Mistake("group-size-missing", "1 x b blocks without group size", REPAIR, _group_size_missing),
    Mistake(
        "group-size-once",
        "the group size stands in one place only; some readers look in the other",
        REPAIR,
        _group_size_once,
    ),
    Mistake(
        "tag-says-one-scale",
        "the tag says one scale, the tensor holds several",
        REPAIR,
        _tag("scalar"),
    ),
    Mistake("tag-hides-groups", "1 x b blocks under another tag", REPAIR, _tag("group")),
    Mistake(
        "tag-says-blocks",
        "the tag says blocks, the scale has another shape",
        REPAIR,
        _tag("blocks"),
    ),
    Mistake("int8-tag-wrong", "the INT8 tag contradicts the scale's shape", REPAIR, _tag("int8")),
    Mistake(
        "scale-not-0d",
        "a single scale is not 0-dimensional",
        REPAIR,
        _scale_shape(Arrangement.TENSOR),
    ),
    Mistake(
        "row-scale-shape", "row scales have the wrong shape", REPAIR, _scale_shape(Arrangement.ROW)
    ),
    Mistake("scale-not-float32", "scales in bf16 or fp16", REPAIR, _half_scales),
    Mistake(
        "scale-missing",
        "the JSON names a format with a scale, and there is none: ComfyUI stops",
        REPAIR,
        _missing_scale,
    ),
    Mistake("input-scale-wrong", "input_scale cannot be one", REPAIR, _input_scale),
    Mistake(
        "dummy-scale",
        "a dummy scale beside a high-precision weight: ComfyUI casts it to FP8",
        REPAIR,
        _dummy_scale,
    ),
    ROTATION_IMPOSSIBLE,
    Mistake(
        "codes-read-as-numbers",
        "quantized where ComfyUI would read codes as numbers",
        REPAIR,
        _place,
    ),
    Mistake(
        "zero-layer-unpacked",
        "a zero layer stored unpacked: it decodes to something else",
        REPAIR,
        _zero_layer,
    ),
    SHAPE_MISSING,
)
EXPLAINED = (SHAPE_MISSING, FORMAT_UNKNOWN, ROTATION_IMPOSSIBLE)  # why a layer is not decoded


def layer_findings(layer: StoredLayer) -> list[Finding]:
    return findings_of(STORED, layer.name, layer)
