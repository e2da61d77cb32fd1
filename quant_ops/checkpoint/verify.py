"""Check a file: every layer decoded by the reference decoder, every known mistake of other writers
looked for.

Ids are those of FORMATS section 8. Not detectable in a file, and therefore not here: M20, M22, M23,
M27, M28, M33, M38 and M40 are about how a file was made or is computed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from ...kernels.hadamard import is_group_size, rotate
from ...kernels.packing import unpack_nibbles, unswizzle_scales
from ..errors import CheckpointError, RecipeError
from ..formats import FORMATS, get_format
from ..sources import TensorSource
from ..spec import FLOAT_DTYPES
from .importers import ImportOptions, StoredLayer, Translation, translate
from .importers.base import FP8, Tensors, input_scale_problem
from .importers.comfy_quant import SCALED
from .importers.flat_4bit import is_zero_defect
from .importers.four_bit import swap_nibbles
from .importers.scaled import is_saturated
from .importers.source import Contents, ImportedSource, as_loadable, read_contents
from .labels import EMBEDDING, LABELS, Label, is_bank, label_of

REPAIR, SHAPES, ORIGINAL = "fewbits repair", "fewbits repair --shapes-from ORIGINAL", None
# id -> (what is wrong, what fixes it; None: only the original does)
MISTAKES: dict[str, tuple[str, str | None]] = {
    "M01": ("the tag says one scale, the tensor holds several", REPAIR),
    "M02": ("a single scale is not 0-dimensional", REPAIR),
    "M03": ("row scales have the wrong shape", REPAIR),
    "M04": ("the JSON has no format", REPAIR),
    "M05": ("the file header and the layer's JSON differ; the header silently wins", REPAIR),
    "M06": ("INT8 codes are truncated instead of rounded", ORIGINAL),
    "M07": ("the tag says blocks, the scale has another shape", REPAIR),
    "M08": ("1 x b blocks without group size, or under another tag", REPAIR),
    "M09": ("a zero layer or block that does not decode to zero", ORIGINAL),
    "M10": ("the low nibble comes first under bitsandbytes' names", REPAIR),
    "M11": ("a flat 4-bit weight without its shape", SHAPES),
    "M12": ("input_scale cannot be one", REPAIR),
    "M13": ("block exponents are rounded down: block maxima are clipped", ORIGINAL),
    "M14": ("block scales are not in ComfyUI's order or padding", ORIGINAL),
    "M15": ("scales in bf16 or fp16", REPAIR),
    "M16": ("comfy_quant is not JSON", REPAIR),
    "M17": ("a dummy scale beside a high-precision weight: ComfyUI casts it to FP8", REPAIR),
    "M18": ("FP8 codes that fill their range but have no scale: it was probably lost", ORIGINAL),
    "M19": ("a scaled_fp8 marker under a prefix: loaders look for one prefix only", REPAIR),
    "M21": ("metadata of the original is missing", ORIGINAL),
    "M24": ("quantized where ComfyUI would read codes as numbers", REPAIR),
    "M25": ("the codes are rotated, the JSON does not say so", ORIGINAL),
    "M26": ("a rotation that cannot be undone", ORIGINAL),
    "M29": ("hybrid_mxfp8 carries one number for many exponents", REPAIR),
    "M30": ("the INT8 tag contradicts the scale's shape", REPAIR),
    "M31": ("the smallest code, which has no positive counterpart, is used", ORIGINAL),
    "M32": ("NaN codes in FP8", ORIGINAL),
    "M34": ("the group size stands in one place only; some readers look in the other", REPAIR),
    "M35": ("the file header names layers that do not exist, or cannot be read", REPAIR),
    "M36": ("layers have names or a place that ComfyUI does not read quantized", ORIGINAL),
    "M37": ("the format is empty or unknown", ORIGINAL),
    "M39": ("a side tensor without its weight", REPAIR),
    "unreadable": ("the layer cannot be decoded", ORIGINAL),
    "error": ("the weights are far from the original's", ORIGINAL),
}
WRONG = 0.5  # rel_l2 above this is another weight: 4-bit codes reach 0.13, swapped nibbles 1.3
TRUNCATED = 0.25  # mean of |w / scale| - |q|: 0 when rounded, 0.5 when truncated
SCALES = (
    "weight_scale", "weight_scale_2", "scale_weight", "absmax", "weight.absmax", "weight_s_channel", "input_scale",
    "scale_input",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One problem: an id of MISTAKES, the layer (or tensor, or "" for the file), and what exactly
    was found.
    """

    id: str
    layer: str
    what: str

    @property
    def fix(self) -> str | None:
        return MISTAKES[self.id][1]

    def to_json(self) -> dict:
        return {**asdict(self), "mistake": MISTAKES[self.id][0], "fix": self.fix}

    def to_text(self) -> str:
        where = f"layer '{self.layer}': " if self.layer else ""
        return f"{self.id}: {where}{MISTAKES[self.id][0]}: {self.what} [{self.fix or 'needs the original'}]"


@dataclass(frozen=True)
class LayerCheck:
    """One quantized layer: how it is stored, and its error against the original where that is
    known.
    """

    name: str
    dialect: str
    format: str | None
    rel_l2: float | None = None
    nibbles: str | None = None  # "low" | "high" for 4-bit layers of other writers


@dataclass(frozen=True)
class Verification:
    """What was checked and what was found; `ok` when nothing is wrong."""

    name: str
    layers: tuple[LayerCheck, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings

    def worst(self) -> list[LayerCheck]:
        """Layers with a known error, largest first."""
        return sorted(
            (layer for layer in self.layers if layer.rel_l2 is not None),
            key=lambda layer: -layer.rel_l2,
        )

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "ok": self.ok,
            "layers": [asdict(layer) for layer in (self.worst() or self.layers)],
            "findings": [finding.to_json() for finding in self.findings],
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        counts: dict[str, int] = {}
        for layer in self.layers:
            order = f", {layer.nibbles} nibble first" if layer.nibbles else ""
            label = f"{layer.format or 'decoded'} ({layer.dialect}{order})"
            counts[label] = counts.get(label, 0) + 1
        lines = [f"{self.name}: {len(self.layers)} quantized layers"]
        lines += [f"  {count:>5}  {label}" for label, count in counts.items()]
        lines += [f"  {layer.rel_l2:.4f}  {layer.name}" for layer in self.worst()]
        lines += [f"note: {warning}" for warning in self.warnings]
        lines += [finding.to_text() for finding in self.findings] or ["no problems found"]
        return "\n".join(lines)


def verify_source(source: TensorSource, original: TensorSource | None = None) -> Verification:
    """Check every layer of a source, one at a time; with the original also its error."""
    contents = read_contents(source)
    truth = (
        ImportedSource(original, retarget=lambda made: made.decoded("F32", ""))
        if original
        else None
    )
    findings = list(_file_findings(contents))
    if original is not None:
        missing = sorted(set(original.header.metadata) - set(source.header.metadata))
        findings += [Finding("M21", "", f"key '{key}'") for key in missing]
    checks = []
    for base, layer in contents.layers.items():
        check, found = _check_layer(base, layer, truth)
        findings += found
        if check is not None:
            checks.append(check)
    if len({check.nibbles for check in checks} - {None}) > 1:
        findings.append(
            Finding("unreadable", "", "some layers store the low nibble first, others the high one")
        )
    return Verification(source.name, tuple(checks), tuple(findings), tuple(source.header.warnings))


def stored_findings(source: TensorSource) -> list[Finding]:
    """The problems that names, shapes and JSON show, without reading any weight."""
    contents = read_contents(source)
    layers = contents.layers.items()
    found = (
        Finding(id, base, what)
        for base, layer in layers
        for check in STORED
        for id, what in check(layer)
    )
    return [*_file_findings(contents), *found]


def _check_layer(
    base: str, layer: StoredLayer, truth: ImportedSource | None
) -> tuple[LayerCheck | None, list[Finding]]:
    found = [Finding(id, base, what) for check in STORED for id, what in check(layer)]
    if _comfyui_bank(layer):
        return LayerCheck(base, "bank of experts, not decoded", layer.said["format"]), found
    try:
        made = translate(layer, ImportOptions())
        if made is None:
            return None, found
        made = as_loadable(base, made)
        stored = {suffix: layer.read(suffix) for suffix in layer.specs}
        canonical = made.convert(stored)
    except CheckpointError as error:
        known = {finding.id for finding in found} & {"M11", "M26", "M37"}
        return None, found if known else [*found, Finding("unreadable", base, str(error))]
    found += [
        Finding(id, base, what)
        for check in DECODED
        for id, what in check(layer, stored, made, canonical)
    ]
    rel_l2 = None
    weight = truth and _original(truth, base)
    if weight is not None:
        rel_l2, more = _compare(made, canonical, weight)
        found += [Finding(id, base, what) for id, what in more]
    return LayerCheck(base, made.dialect, made.format, rel_l2, made.nibbles), found


def _comfyui_bank(layer: StoredLayer) -> bool:
    """Experts in a format of ComfyUI's own, which reads them; their side tensors are not those of
    the formats here.
    """
    format = FORMATS.get(layer.said.get("format"))
    return format is not None and format.native and is_bank(layer.said, layer.weight.shape)


def _original(truth: ImportedSource, base: str) -> torch.Tensor | None:
    spec = truth.header.tensors.get(f"{base}.weight")
    return (
        truth.read(spec.name).float() if spec is not None and spec.dtype in FLOAT_DTYPES else None
    )


# ---- the file as a whole ----


def _file_findings(contents: Contents) -> Iterator[Finding]:
    yield from (Finding("M19", "", f"'{key}'") for key, prefix in contents.scopes.items() if prefix)
    yield from (Finding("M39", "", f"'{spec.name}'") for spec in contents.orphans)
    if contents.header_problem:
        yield Finding("M35", "", contents.header_problem)
    if contents.unresolved:
        names = ", ".join(contents.unresolved[:3])
        yield Finding("M35", "", f"{len(contents.unresolved)} names without a weight ({names})")
    if contents.missing_prefix:
        yield Finding("M35", "", f"names lack the prefix '{contents.missing_prefix}'")


# ---- a layer as stored: (id, what) pairs from shapes, dtypes and JSON ----

Problems = Iterable[tuple[str, str]]


def _json(layer: StoredLayer) -> Problems:
    if layer.unreadable:
        yield "M16", layer.unreadable
    if layer.header_marker and layer.tensor_marker and layer.header_marker != layer.tensor_marker:
        yield "M05", f"header {layer.header_marker}, layer {layer.tensor_marker}"
    if layer.marker is None:
        return
    name = layer.said.get("format")
    if name is None and layer.weight.dtype not in FLOAT_DTYPES:
        yield "M04", f"{layer.marker}"
    elif name == "" or (
        name is not None and name not in FORMATS and name not in ("hybrid_mxfp8", "bnb_af4")
    ):
        yield "M37", f"{name!r}"
    if name == "hybrid_mxfp8":
        yield "M29", "weight_scalar" if "weight_scalar" in layer.specs else "the format's name"


def _group_size(layer: StoredLayer) -> Problems:
    marker, name = layer.marker or {}, layer.said.get("format")
    blocks = (
        name in FORMATS
        and "block_size" in FORMATS[name].choices
        or name in ("mxfp8", "nvfp4", "asym_w4a8_int8")
    )
    if not blocks or _comfyui_bank(layer):
        return
    params = marker.get("params")
    places = ("group_size" in marker, isinstance(params, dict) and "group_size" in params)
    if name == "float8_e4m3fn_block3d" and not any(places):
        yield "M08", "no group size"
    elif not all(places):
        yield "M34", f"{marker}"


def _labels(layer: StoredLayer) -> Problems:
    name, scale = layer.said.get("format"), layer.specs.get("weight_scale")
    if (
        name not in SCALED
        or scale is None
        or layer.weight.dtype not in LABELS
        or len(layer.weight.shape) != 2
    ):
        return
    widened = {**layer.specs, "weight_scale": replace(scale, dtype="F32")}
    try:
        get_format(name).options_from(layer.said, widened)
        return
    except (CheckpointError, RecipeError):
        pass
    try:
        label = label_of(
            layer.weight.dtype, layer.matrix, scale.shape, name, layer.said.get("group_size")
        )
    except CheckpointError:
        return  # reported as unreadable
    if label.format != name:
        yield (
            _mislabelled(name, label),
            f"tag {name}, scale {list(scale.shape)} means {label.format}",
        )
    elif label.geometry == "tensor" and scale.shape:
        yield "M02", f"weight_scale is {list(scale.shape)}"
    elif label.geometry == "row":
        yield "M03", f"weight_scale is {list(scale.shape)}"


def _mislabelled(tag: str, label: Label) -> str:
    if label.format == "float8_e4m3fn_block3d":
        return "M08"
    if tag.endswith("_blockwise") and label.geometry == "row":
        return "M07"
    return "M30" if tag.startswith("int8") else "M01"


def _scales(layer: StoredLayer) -> Problems:
    half = [
        suffix
        for suffix in SCALES
        if suffix in layer.specs and layer.specs[suffix].dtype in ("BF16", "F16")
    ]
    if half:
        yield "M15", ", ".join(f"{suffix} {layer.specs[suffix].dtype}" for suffix in half)
    name = layer.said.get("format")
    if "input_scale" in layer.specs and name in FORMATS:
        problem = input_scale_problem(layer, "input_scale", name)
        if problem:
            yield "M12", problem
    if layer.weight.dtype in FLOAT_DTYPES and "scale_weight" in layer.specs:
        yield "M17", f"weight is {layer.weight.dtype}"


def _rotation(layer: StoredLayer) -> Problems:
    if not layer.said.get("convrot") or layer.weight.dtype != "I8" or len(layer.weight.shape) != 2:
        return
    group, scale = layer.said.get("convrot_groupsize", 256), layer.specs.get("weight_scale")
    if type(group) is not int or not is_group_size(group) or layer.matrix[1] % group:
        yield "M26", f"convrot_groupsize {group!r} for K={layer.matrix[1]}"
    elif scale is not None and scale.numel == 1 and layer.matrix[0] > 1:
        yield "M26", "rotated with one scale for the whole tensor"


def _place(layer: StoredLayer) -> Problems:
    name = layer.said.get("format")
    if name not in FORMATS:
        return
    if EMBEDDING.fullmatch(layer.name) and FORMATS[name].embedding_min_comfyui is None:
        yield "M24", f"embedding table in {name}"
    elif len(layer.weight.shape) not in (2, 3) and not name.startswith("bnb_"):
        yield "M24", f"{len(layer.weight.shape)}-D weight in {name}"


def _four_bit(layer: StoredLayer) -> Problems:
    name, absmax = layer.said.get("format"), layer.specs.get("absmax")
    size = layer.said.get("group_size")
    if (
        not isinstance(name, str)
        or not name.startswith("bnb_")
        or absmax is None
        or type(size) is not int
    ):
        return
    if is_zero_defect(layer, size):
        yield "M09", f"weight {list(layer.weight.shape)} stored unpacked"
    elif "shape" not in layer.said:
        yield "M11", f"{2 * layer.weight.nbytes} codes"


STORED: tuple[Callable[[StoredLayer], Problems], ...] = (
    _json, _group_size, _labels, _scales, _rotation, _place, _four_bit,
)  # fmt: skip


# ---- a layer with its values ----


def _nibbles(
    layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors
) -> Problems:
    if made.dialect == "D30":
        yield "M10", made.note


def _codes(layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors) -> Problems:
    weight = stored["weight"]
    if layer.weight.dtype in FP8:
        nan = int(weight.isnan().sum())
        if nan:
            yield "M32", f"{nan} codes"
        if layer.first("weight_scale", "scale_weight") is None and is_saturated(weight):
            yield "M18", f"largest code of {layer.weight.dtype}"
    elif made.format in ("int8_tensorwise", "int8_blockwise", "int8_lodewise"):
        lowest = int((weight == -128).sum())
        if lowest:
            yield "M31", f"{lowest} codes are -128"
    elif made.format == "convrot_w4a4":
        lowest = int((unpack_nibbles(weight, high_first=False) == 8).sum())
        if lowest:
            yield "M31", f"{lowest} codes are -8"


def _values(layer: StoredLayer, stored: Tensors, made: Translation, canonical: Tensors) -> Problems:
    scale = canonical.get("weight_scale_2", canonical.get("weight_scale", canonical.get("absmax")))
    if scale is not None and scale.dtype == torch.float32:
        broken = int((~torch.isfinite(scale) | (scale < 0)).sum())
        if broken:
            yield "M09", f"{broken} scales are NaN, infinite or negative"


DECODED: tuple[Callable[[StoredLayer, Tensors, Translation, Tensors], Problems], ...] = (
    _nibbles,
    _codes,
    _values,
)


# ---- a layer against the original ----


def _compare(
    made: Translation, canonical: Tensors, weight: torch.Tensor
) -> tuple[float, list[tuple[str, str]]]:
    decode = _decoder(made)
    decoded = decode(canonical)
    if decoded.shape != weight.shape:
        return math.inf, [
            ("error", f"shape {list(decoded.shape)}, the original has {list(weight.shape)}")
        ]
    error = _rel_l2(decoded, weight)
    if not error < WRONG:
        return error, [_explained(made, canonical, decode, decoded, weight, error)]
    problems = []
    if (
        made.format in ("int8_tensorwise", "int8_blockwise", "int8_lodewise")
        and not made.options.convrot
    ):
        bias = _truncation(canonical["weight"], decoded, weight)
        if bias > TRUNCATED:
            problems.append(("M06", f"codes are {bias:.2f} steps too small on average"))
    if made.format == "mxfp8":
        clipped = _clipped_blocks(canonical, weight)
        if clipped:
            problems.append(("M13", f"{clipped} blocks"))
    return error, problems


def _decoder(made: Translation) -> Callable[[Tensors], torch.Tensor]:
    if made.format is None:
        return lambda tensors: tensors["weight"].float()
    format = get_format(made.format)
    return lambda tensors: format.dequantize(tensors, made.layer, made.options)


def _rel_l2(decoded: torch.Tensor, weight: torch.Tensor) -> float:
    norm = float(weight.norm())
    difference = float((decoded - weight).norm())
    return difference / norm if norm else difference


def _explained(
    made: Translation,
    canonical: Tensors,
    decode: Callable[[Tensors], torch.Tensor],
    decoded: torch.Tensor,
    weight: torch.Tensor,
    error: float,
) -> tuple[str, str]:
    """Which known mistake a wrong weight comes from: the reading that brings it close to the
    original.
    """
    if made.format in ("bnb_nf4", "bnb_fp4"):
        other = _rel_l2(decode({**canonical, "weight": swap_nibbles(canonical["weight"])}), weight)
        if other < WRONG:
            return "M10", f"rel_l2 {error:.2f}, with the nibbles swapped {other:.2f}"
    for group in (16, 64, 256):
        if weight.dim() == 2 and weight.shape[1] % group == 0:
            other = _rel_l2(rotate(decoded, group), weight)
            if other < WRONG:
                return "M25", f"rel_l2 {error:.2f}, un-rotated in groups of {group} {other:.2f}"
    return ("M14" if made.format in ("mxfp8", "nvfp4") else "error"), f"rel_l2 {error:.2f}"


def _truncation(codes: torch.Tensor, decoded: torch.Tensor, weight: torch.Tensor) -> float:
    """Mean of |w / scale| - |q| over codes that are neither zero nor clamped; the scale is decoded
    / q.
    """
    q = codes.float()
    inner = (q != 0) & (q.abs() < 127)
    if not inner.any():
        return 0.0
    scale = decoded[inner] / q[inner]
    return float(((weight[inner] / scale).abs() - q[inner].abs()).mean())


def _clipped_blocks(canonical: Tensors, weight: torch.Tensor) -> int:
    """Blocks of 32 whose maximum is larger than their exponent can hold."""
    n, k = weight.shape
    exponents = unswizzle_scales(canonical["weight_scale"].view(torch.uint8), n, k // 32).float()
    largest = weight[:, : k // 32 * 32].reshape(n, -1, 32).abs().amax(-1)
    return int((largest > 448 * torch.exp2(exponents - 127)).sum())
