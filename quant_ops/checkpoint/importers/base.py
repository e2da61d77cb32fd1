"""What every dialect shares: a layer as a file holds it, what the user adds to it, and its
canonical translation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from ...errors import CheckpointError, RecipeError
from ...files import InputFile
from ...formats import FormatOptions, get_format
from ...formats.asym_w4a8 import AsymW4A8
from ...formats.base import dtype_from_json, is_precise, params_of
from ...formats.nvfp4 import Nvfp4
from ...sources import TORCH_DTYPES
from ...spec import FLOAT_DTYPES, LayerInput, TensorSpec

Tensors = dict[str, torch.Tensor]
Specs = dict[str, tuple[str, tuple[int, ...]]]

FP8 = ("F8_E4M3", "F8_E5M2")
# What a layer's weight may be stored as, by suffix: plainly, by quanto, by compressed-tensors, by
# AWQ, GPTQ and nunchaku.
CODES = ("weight", "weight._data", "weight._data._data", "weight_packed", "qweight")
# Where the scales of FP8 codes may stand.
FP8_SCALES = ("weight_scale", "scale_weight", "weight._scale", "weight_scale_inv")
# What 4-bit layers that do not say it may be said to be.
ASSUMED = ("nf4", "fp4", Nvfp4.name)
# Names under which other tools write a format -> ComfyUI's name.
SPELLINGS = {"w4a8_int8": AsymW4A8.name, "w4a8": AsymW4A8.name}


@dataclass(frozen=True)
class ImportOptions:
    """What a file does not say and the user may.

    `foreign_only` leaves alone what ComfyUI reads by itself, plain FP8 casts and unknown formats
    included; the others are brought into canonical form completely.
    """

    # "nf4" | "fp4" for 4-bit layers that do not say which, "nvfp4" for block scales without JSON
    assume: str | None = None
    assume_convrot: int | None = None  # rotation group of INT8 layers without JSON
    nibble_order: str | None = None  # "low" | "high", where no rule decides
    # tensor name -> logical shape of the original
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    files: tuple[InputFile, ...] = ()  # that the shapes came from
    full_precision_mm: bool = False  # mark every FP8 layer
    foreign_only: bool = False
    left: frozenset[str] = frozenset()  # layers that stay as they are stored
    decoded: frozenset[str] = frozenset()  # layers to be quantized again: read as float weights
    host_formats: frozenset[str] = frozenset()  # formats that the ComfyUI at hand reads without us

    def __post_init__(self):
        if self.assume not in (None, *ASSUMED):
            raise RecipeError(
                f"assume is {self.assume!r}, it may be one of {', '.join(ASSUMED)}", option="assume"
            )


@dataclass(frozen=True)
class FileFacts:
    """What a file says about all its layers. `scopes` maps the prefix of each `scaled_fp8` marker
    to its size.
    """

    scopes: dict[str, int]
    # metadata of the converters that packed the low nibble first
    low_nibble_first: bool

    def scope_of(self, name: str) -> str | None:
        """The prefix of the marker that owns a tensor, the longest; None when no marker does."""
        owners = (prefix for prefix in self.scopes if name.startswith(prefix))
        return max(owners, key=len, default=None)


@dataclass(frozen=True)
class StoredLayer:
    """One layer as stored. `specs` and `read` go by suffix: "weight", "weight_scale",
    "weight.absmax".

    `marker` is the JSON that counts (the header wins), None without any; `unreadable` says why
    stored JSON is not.
    """

    name: str
    specs: dict[str, TensorSpec]
    read: Callable[[str], torch.Tensor]
    file: FileFacts
    header_marker: dict | None = None
    tensor_marker: dict | None = None
    unreadable: str | None = None
    bias: int | None = None
    sample: Callable[[str], torch.Tensor] | None = (
        None  # a part of a tensor; None: look at everything
    )

    @property
    def marker(self) -> dict | None:
        if self.header_marker is None:
            return self.tensor_marker
        return self.header_marker

    @cached_property
    def said(self) -> dict:
        """The marker with `params` lifted to the top level (older writers know one place or the
        other) and the format under ComfyUI's name.
        """
        marker = self.marker or {}
        said = {**params_of(marker), **marker}
        name = said.get("format")
        if self.misspelled:
            return {**said, "format": SPELLINGS[name]}
        return said

    @property
    def misspelled(self) -> bool:
        """Whether the format stands under a name of other tools, which ComfyUI does not know."""
        return isinstance(self.marker, dict) and self.marker.get("format") in tuple(SPELLINGS)

    @property
    def codes(self) -> str:
        """The suffix of what is stored for the weight."""
        return self.first(*CODES) or "weight"

    @property
    def weight(self) -> TensorSpec:
        return self.specs[self.codes]

    @property
    def matrix(self) -> tuple[int, int]:
        """(N, K) of a weight stored as it is.

        Raises:
            CheckpointError: not a matrix.
        """
        shape = self.weight.shape
        if len(shape) != 2:
            raise CheckpointError(
                f"weight is {len(shape)}-D {list(shape)}; only matrices are stored quantized"
            )
        return shape[0], shape[1]

    @property
    def precise(self) -> bool:
        return is_precise(self.said)

    @property
    def orig_dtype(self) -> str:
        """safetensors dtype of the original as far as the JSON says, else BF16."""
        return dtype_from_json(self.said.get("orig_dtype", self.said.get("dtype"))) or "BF16"

    def first(self, *suffixes: str) -> str | None:
        """The first of these suffixes that is stored."""
        return next((suffix for suffix in suffixes if suffix in self.specs), None)

    def sampled(self, suffix: str) -> torch.Tensor:
        """A part of a tensor that shows what it holds, or all of it; flat."""
        part = self.read(suffix) if self.sample is None else self.sample(suffix)
        return part.reshape(-1)

    def number(self, suffix: str) -> float | None:
        """The value of a one-element tensor, None when it has another size."""
        if self.specs[suffix].numel == 1:
            return float(self.read(suffix).float().item())
        return None


@dataclass(frozen=True)
class Translation:
    """A layer in canonical form: quantized in one of FORMATS, copied as ComfyUI reads it (`decode`
    says what it means), or (`format` and `decode` None) a plain float weight.

    `outputs` states dtype and shape per suffix before anything is read; `convert` maps the stored
    tensors to them.
    """

    dialect: str
    outputs: Specs
    convert: Callable[[Tensors], Tensors]
    note: str
    format: str | None = None
    options: FormatOptions = field(default_factory=FormatOptions)
    layer: LayerInput | None = None
    marker: dict | None = None
    float_dtype: str = "BF16"  # what the layer becomes if it has to be decoded
    nibbles: str | None = None  # "low" | "high" where the order was in question
    warnings: tuple[str, ...] = ()
    stock: bool = False  # ComfyUI reads the stored layer rightly without FewBits
    asked: tuple[str, ...] = ()  # the ImportOptions that decided something
    # of a layer that is copied: canonical tensors -> float32, and the shape of that
    decode: Callable[[Tensors], torch.Tensor] | None = None
    shape: tuple[int, ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether the layer is a plain weight."""
        return self.format is None and self.decode is None

    def decoded(self, dtype: str, note: str) -> Translation:
        """The same layer as a float weight: canonical decoder, rounded once, `pre_quant_scale`
        multiplied in.
        """
        return self._as_float(dtype, note, lambda weight: weight.to(TORCH_DTYPES[dtype]))

    def exactly(self, note: str) -> Translation:
        """The same as a weight of `float_dtype` that is read in float32: to be quantized again."""
        return self._as_float(self.float_dtype, note, lambda weight: weight)

    def _as_float(
        self, dtype: str, note: str, rounded: Callable[[torch.Tensor], torch.Tensor]
    ) -> Translation:
        if self.is_float:
            return self

        def decode(tensors: Tensors) -> Tensors:
            stored = self.convert(tensors)
            weight = self.weight(stored)
            if "pre_quant_scale" in stored:
                weight = weight * stored["pre_quant_scale"].float()[None, :]
            return {"weight": rounded(weight)}

        return Translation(
            dialect=self.dialect,
            outputs={"weight": (dtype, self.layer.shape if self.layer else self.shape)},
            convert=decode,
            note=f"{self.note}; {note}" if self.note else note,
            nibbles=self.nibbles,
            warnings=self.warnings,
            asked=self.asked,
        )

    def weight(self, stored: Tensors) -> torch.Tensor:
        """The logical weight in float32 by the canonical decoder, `pre_quant_scale` apart."""
        if self.decode is not None:
            return self.decode(stored)
        if self.format is None:
            return stored["weight"].float()
        return get_format(self.format).dequantize(stored, self.layer, self.options)


class Dialect(Protocol):
    """One way in which files store layers."""

    def claims(self, layer: StoredLayer) -> bool:
        """Whether the evidence is there; earlier dialects in the list have
        declined.
        """

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation | None:
        """The canonical layer; None leaves its tensors as they are.

        Raises:
            CheckpointError: recognised, but it cannot be read without guessing.
        """


def fit(tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor under its canonical dtype and shape: one-byte types change name, floats are
    converted.
    """
    wanted = TORCH_DTYPES[dtype]
    if tensor.dtype != wanted:
        same_bytes = tensor.itemsize == wanted.itemsize == 1
        tensor = tensor.contiguous().view(wanted) if same_bytes else tensor.to(wanted)
    return tensor.reshape(shape)


def quantized(
    dialect: str,
    layer: StoredLayer,
    format_name: str,
    source: LayerInput,
    options: FormatOptions,
    convert: Callable[[Tensors], Tensors],
    note: str,
    nibbles: str | None = None,
    warnings: tuple[str, ...] = (),
    asked: tuple[str, ...] = (),
) -> Translation:
    """A translation into one of our formats, side tensors that stay included.

    Args:
        convert: stored tensors -> the format's tensors, dtype and shape up to `fit`.
    """
    format = get_format(format_name)
    specs = format.tensor_specs(source, options)
    sides, dropped = _kept_sides(layer, format_name, source.shape)

    def translate(tensors: Tensors) -> Tensors:
        made = convert(tensors)
        made = {suffix: fit(made[suffix], *spec) for suffix, spec in specs.items()}
        return {
            **made,
            **{to: fit(tensors[of], dtype, shape) for to, (of, dtype, shape) in sides.items()},
        }

    return Translation(
        dialect=dialect,
        outputs={
            **specs,
            **{suffix: (dtype, shape) for suffix, (_, dtype, shape) in sides.items()},
        },
        convert=translate,
        note=note,
        format=format_name,
        options=options,
        layer=source,
        marker=format.marker(source, options),
        float_dtype=source.dtype if source.dtype in FLOAT_DTYPES else layer.orig_dtype,
        nibbles=nibbles,
        warnings=(*warnings, *dropped),
        asked=asked,
    )


def floating(
    dialect: str,
    layer: StoredLayer,
    shape: tuple[int, ...],
    decode: Callable[[Tensors], torch.Tensor],
    note: str,
    dtype: str | None = None,
    nibbles: str | None = None,
    asked: tuple[str, ...] = (),
) -> Translation:
    """A translation into a plain weight; `decode` gives float32, rounded here once."""
    dtype = dtype or layer.orig_dtype
    _refuse_misfit(layer, shape)

    def translate(tensors: Tensors) -> Tensors:
        weight = decode(tensors).reshape(shape)
        if "pre_quant_scale" in tensors:
            weight = weight * tensors["pre_quant_scale"].float()[None, :]
        refuse_non_finite(layer.name, weight)
        return {"weight": weight.to(TORCH_DTYPES[dtype])}

    outputs = {"weight": (dtype, shape)}
    return Translation(dialect, outputs, translate, note, nibbles=nibbles, asked=asked)


def refuse_non_finite(name: str, weight: torch.Tensor) -> None:
    """
    Raises:
        CheckpointError: a decoded weight has NaN or infinite values.
    """
    broken = weight.numel() - int(torch.isfinite(weight).sum())
    if broken:
        raise CheckpointError(
            f"layer '{name}' decodes to {broken} values that are no numbers; the file is damaged: "
            "get a good copy"
        )


def _refuse_misfit(layer: StoredLayer, shape: tuple[int, ...]) -> None:
    """`pre_quant_scale` has one number per column.

    Raises:
        CheckpointError: it has another shape or holds no numbers.
    """
    spec = layer.specs.get("pre_quant_scale")
    if spec is None:
        return
    if len(shape) != 2 or spec.shape != (shape[1],) or spec.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"pre_quant_scale is {spec.dtype} {list(spec.shape)}; a weight of {list(shape)} needs "
            "one number per column"
        )


def _kept_sides(
    layer: StoredLayer, format_name: str, shape: tuple[int, ...]
) -> tuple[dict[str, tuple[str, str, tuple[int, ...]]], tuple[str, ...]]:
    """(canonical suffix -> (stored suffix, dtype, shape), warnings) of the tensors that stay beside
    the weight.
    """
    sides = {}
    warnings = []
    _refuse_misfit(layer, shape)
    if "pre_quant_scale" in layer.specs:
        spec = layer.specs["pre_quant_scale"]
        sides["pre_quant_scale"] = ("pre_quant_scale", spec.dtype, spec.shape)
    suffix = layer.first("input_scale", "scale_input")
    if suffix is not None:
        problem = input_scale_problem(layer, suffix, format_name)
        if problem is None:
            sides["input_scale"] = (suffix, "F32", ())
        else:
            warnings.append(f"layer '{layer.name}': {suffix} dropped: {problem}")
    return sides, tuple(warnings)


def input_scale_problem(layer: StoredLayer, suffix: str, format_name: str) -> str | None:
    """Why a stored input scale cannot be one; None when it can.

    A scale equal to the weight's own is a copy, unless both are 1.0: old FP8 files mean that.
    """
    if not get_format(format_name).largest_input:
        return f"{format_name} scales its input while running"
    value = layer.number(suffix)
    if value is None:
        return f"it has {layer.specs[suffix].numel} elements, one is allowed"
    if not math.isfinite(value) or value <= 0:
        return f"it is {value}"
    own = layer.first(*FP8_SCALES)
    if (
        value != 1.0
        and own is not None
        and layer.specs[own].numel == 1
        and layer.number(own) == value
    ):
        return "it is a copy of the weight's scale"
    return None


def resolved(format_name: str, stated: Mapping[str, object]) -> FormatOptions | None:
    """The options with defaults, or None when the format does not write such sizes."""
    try:
        return get_format(format_name).configure(stated)
    except RecipeError:
        return None
