"""Format: everything about one way to store a quantized layer, known from the input shape alone."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import ClassVar

import torch

from ...kernels.dispatch import Op
from ...kernels.grids import Grid, Scale
from ...kernels.hadamard import rotate
from ..errors import CheckpointError, RecipeError, closest
from ..options import Configurable, Options
from ..spec import LayerInput, TensorSpec
from .arrangement import Arrangement
from .chain import Next

PRECISE = "full_precision_matrix_mult"  # the option that every format has, and its key in a marker


@dataclass(frozen=True)
class FormatOptions(Options):
    """What every format can be told; a format's own `Options` add the rest.

    `stored` lists values that files of other writers hold and nothing here writes.
    """

    full_precision_matrix_mult: bool = False

    stored: ClassVar[Mapping[str, tuple]] = {}

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """The format's own options first."""
        own = (name for name in super().names() if name != PRECISE)
        return (*own, PRECISE)

    @classmethod
    def readable(cls, name: str) -> tuple:
        return (*cls.values(name), *cls.stored.get(name, ()))


class Format(Configurable, ABC):
    """One on-disk format: a class states everything about it, with the bytes of a small example.

    An example gives a float32 weight row by row and what is stored for it in hexadecimal; `0 x3` is
    0 0 0, and `3 rows of` a line are three such lines.

    Side tensors are `<base>.<suffix>`; `pack` and `unpack` use the suffix alone ("weight",
    "weight_scale"), so a format can be tested with two tensors and no file.
    """

    noun = "format"
    Options: type[FormatOptions] = FormatOptions

    name: str
    short: str = ""  # what users may write in its place
    short_options: Mapping[str, object] = {}  # what the short name means where it is not stated
    called: tuple[str, ...] = ()  # names that are taken for it in "did you mean"
    read_as: tuple[str, ...] = ()  # names in files that are read as this one and never written
    # since when ComfyUI reads it, stock (`native`) or with FewBits installed
    min_comfyui: str
    native: bool
    # since when ComfyUI looks up single rows of it (an Embedding); None = never
    embedding_min_comfyui: str | None = None
    # what a GPU must have for ComfyUI's own kernel, as in its `supports_fp8_compute`; None: nothing
    unit: str | None = None
    # the largest input that an `input_scale` of 1, stored beside it, lets through; 0: none is used
    largest_input: float = 0.0
    method: str = "nearest"  # how codes are chosen where a wish names no method
    stores: str  # which weights share a scale, in words
    # the same where the shape of `weight_scale` shows it; such a format is known by shapes alone
    arrangements: tuple[Arrangement, ...] = ()
    codes_per_byte: int = 1
    # the code below all that are written, in files of other writers; None where every code is used
    unused_code: int | None = None
    # scaling modes of a layer-config that mean this format though it does not take them
    modes_meant: tuple[str, ...] = ()
    swizzled: bool = False  # whether block scales lie in the order of cuBLAS
    lacks_group_size: bool = False  # whether older files of it state no group size
    # suffix -> another dtype of the same bytes, under which files may store that tensor
    aliases: Mapping[str, str] = {}
    # options that a runtime tensor must carry to be quantized again: they decide codes and scales
    layout_options: tuple[str, ...] = ()

    def configure(self, stated: Mapping[str, object]) -> FormatOptions:
        """Defaults with the stated options in their place.

        None says nothing, and neither does False where there is no switch, or one that only turns
        on.

        Raises:
            RecipeError: an option that the format does not have, or a value it does not allow.
        """
        said = {
            name: value
            for name, value in stated.items()
            if value is not None and (value is not False or False in self.Options.values(name))
        }
        return super().configure(said)

    def meant_by(self, name: str) -> Mapping[str, object]:
        """The options that a user states by writing this name."""
        if name == self.short:
            return self.short_options
        return {}

    def settled(
        self, layer: LayerInput, options: FormatOptions, *, looked_up: bool = False
    ) -> FormatOptions:
        """The options for one layer, with everything decided that was left to the format.

        Args:
            looked_up: whether the layer is an embedding table.
        """
        return options

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        """Why this (N, K) does not fit, as the plan says it; None when it does."""
        return None

    def fallback(self, layer: LayerInput, options: FormatOptions) -> Next | None:
        """The next format to try when `check` refuses, with what is stated about it, or None to
        keep the layer.
        """
        return None

    def notes(self, layer: LayerInput, options: FormatOptions) -> tuple[str, ...]:
        """What the plan says about a layer that fits: padding, straddling blocks."""
        return ()

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        """(N, K) must be multiples of these; a runtime tensor is zero-padded to them."""
        return 1, 1

    @abstractmethod
    def tensor_specs(
        self, layer: LayerInput, options: FormatOptions
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """suffix -> (safetensors dtype, shape) of every stored tensor, the marker excepted."""

    @abstractmethod
    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        """The layer's `comfy_quant` object; key order is the order written."""

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """suffix -> safetensors dtype of every stored tensor, the marker excepted."""
        options = self.Options()
        smallest = LayerInput(self.steps(options), None)
        specs = self.tensor_specs(smallest, options)
        return {suffix: dtype for suffix, (dtype, _) in specs.items()}

    @property
    def code_dtype(self) -> str:
        """safetensors dtype of the stored weight."""
        return self.dtypes["weight"]

    def rotation(self, options: FormatOptions) -> int | None:
        """In groups of how many columns the weight is rotated before it gets codes; None: not."""
        return None

    def same_codes(self, options: FormatOptions, other: FormatOptions) -> bool:
        """Whether layers with these options hold the same codes and scales, or may."""
        return all(getattr(options, name) == getattr(other, name) for name in self.layout_options)

    def options_from(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        """Read the options of a stored layer back; shapes win over the marker.

        Raises:
            CheckpointError: stored dtypes or shapes do not fit the format.
            RecipeError: an option that the format does not hold.
        """
        stored = self.stored_options(marker, specs)
        if is_precise(marker):
            stored = {**stored, PRECISE: True}
        with self.named_in_errors():
            options = self.Options(**stored)
        self.refuse_misfit(self.stored_layer(marker, specs), options, specs)
        return options

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> dict[str, object]:
        """The format's own options as marker and shapes state them.

        Raises:
            CheckpointError: they contradict each other, or the format.
        """
        return {}

    def stored_layer(self, marker: dict, specs: dict[str, TensorSpec]) -> LayerInput:
        """The logical shape and source dtype of a stored layer."""
        rows, cols = self.stored_matrix(specs)
        return LayerInput((rows, cols * self.codes_per_byte), None)

    def stored_matrix(self, specs: dict[str, TensorSpec]) -> tuple[int, int]:
        """Rows and columns of the stored weight.

        Raises:
            CheckpointError: it is missing or not a matrix.
        """
        shape = specs["weight"].shape if "weight" in specs else ()
        if len(shape) != 2:
            raise CheckpointError(
                f"weight is {list(shape) or 'missing'}, {self.name} stores a matrix"
            )
        return shape[0], shape[1]

    def prepare(self, weight: torch.Tensor, options: FormatOptions) -> torch.Tensor:
        """The matrix whose entries get codes: the weight itself, or its rotated (float32) or
        zero-padded version.
        """
        group = self.rotation(options)
        if group is None:
            return weight
        return rotate(weight, group)

    @abstractmethod
    def grid(self, layer: LayerInput, options: FormatOptions) -> Grid:
        """The representable values of the prepared weight, for a method to choose from."""

    @abstractmethod
    def pack(
        self, codes: torch.Tensor, scale: Scale, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        """suffix -> stored tensor."""

    def quantize(
        self, prepared: torch.Tensor, grid: Grid, options: FormatOptions, seed: int = 0
    ) -> dict[str, torch.Tensor]:
        """Prepared weight -> stored tensors with the nearest codes; rounded stochastically for a
        seed other than 0.
        """
        if not seed:
            return self.pack(*grid.nearest(prepared), options)
        scale = grid.scale(prepared)
        return self.pack(grid.encode(prepared, scale, seed), scale, options)

    @abstractmethod
    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        """Stored tensors -> (N, K) float32, written apart from the encoder."""

    def codes(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, K) codes of stored tensors, one a byte."""
        return tensors["weight"]

    def overflowing(self, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> int:
        """How many blocks of the original have a maximum that their stored scale cannot reach; 0
        where nothing tells.
        """
        return 0

    def dequantize_to(
        self,
        tensors: dict[str, torch.Tensor],
        layer: LayerInput,
        options: FormatOptions,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """`dequantize`, rounded once to `dtype`; formats with a kernel for it override this with
        equal results.
        """
        return self.dequantize(tensors, layer, options).to(dtype)

    def product(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> tuple[Op, tuple] | None:
        """The op that multiplies x by the stored codes, and its arguments between x and the bias.

        None where the weight is decoded first.
        """
        return None

    def linear(
        self,
        x: torch.Tensor,
        tensors: dict[str, torch.Tensor],
        layer: LayerInput,
        options: FormatOptions,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (M, K) @ W.T + bias in x's dtype."""
        if product := self.product(tensors, layer, options):
            op, arguments = product
            return op(x, *arguments, bias)
        return torch.nn.functional.linear(
            x, self.dequantize_to(tensors, layer, options, x.dtype), bias
        )

    def refuse_misfit(
        self, layer: LayerInput, options: FormatOptions, specs: dict[str, TensorSpec]
    ) -> None:
        """Compare stored tensors with `tensor_specs`.

        Raises:
            CheckpointError: a tensor is missing, or has another dtype or shape.
        """
        for suffix, (dtype, shape) in self.tensor_specs(layer, options).items():
            if suffix not in specs:
                raise CheckpointError(f"'{suffix}' is missing; {self.name} needs it")
            got = specs[suffix]
            if got.dtype not in (dtype, self.aliases.get(suffix)) or tuple(got.shape) != shape:
                raise CheckpointError(
                    f"{suffix} is {got.dtype} {list(got.shape)}, {self.name} allows {dtype} "
                    f"{list(shape)}"
                )

    def output_specs(
        self, base: str, layer: LayerInput, options: FormatOptions
    ) -> tuple[TensorSpec, ...]:
        """Every tensor written for the layer, marker included."""
        marker = marker_bytes(self.marker(layer, options))
        specs = [
            TensorSpec(f"{base}.{suffix}", *spec)
            for suffix, spec in self.tensor_specs(layer, options).items()
        ]
        return (*specs, TensorSpec(f"{base}.comfy_quant", "U8", (len(marker),)))


def marker_bytes(marker: dict) -> bytes:
    """The bytes of a `comfy_quant` tensor: UTF-8 JSON with Python's default separators."""
    return json.dumps(marker).encode("utf-8")


def params_of(marker: dict) -> dict:
    """Where older writers state the options of a layer; empty where it is no object."""
    params = marker.get("params")
    if isinstance(params, dict):
        return params
    return {}


def stated_in(marker: dict, name: str, default: object = None) -> object:
    """An option that a marker states at its top, or else in `params`."""
    return marker.get(name, params_of(marker).get(name, default))


def is_precise(marker: dict) -> bool:
    """Whether a marker asks for products of unrounded activations."""
    return bool(marker.get(PRECISE, False))


def with_precision(marker: dict, options: FormatOptions) -> dict:
    """Append `full_precision_matrix_mult`, last and only when true."""
    if options.full_precision_matrix_mult:
        return {**marker, PRECISE: True}
    return marker


# How markers name the dtype a layer was made from; float64 is rounded to float32 before anything
# else.
JSON_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


def dtype_to_json(dtype: str) -> str:
    """`"BF16"` -> `"bfloat16"`."""
    return JSON_DTYPES[dtype]


def dtype_from_json(name: object) -> str | None:
    """`"bfloat16"` or `"torch.bfloat16"` -> `"BF16"`; None for anything else."""
    plain = str(name).removeprefix("torch.")
    return next((dtype for dtype, known in JSON_DTYPES.items() if known == plain), None)


FORMATS: dict[str, Format] = {}


def register_format(format: Format) -> Format:
    FORMATS[format.name] = format
    return format


def get_format(name: str) -> Format:
    """Look a format up by its exact name, as files state it.

    Raises:
        RecipeError: no such format; the message suggests the closest name and lists all.
    """
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    raise RecipeError(unknown_format(name))


def option_values(option: str, formats: Iterable[str] | None = None) -> tuple:
    """What an option may be in some formats, or in any, each value once."""
    names = FORMATS if formats is None else formats
    values = (FORMATS[name].Options.values(option) for name in names)
    return tuple(dict.fromkeys(chain.from_iterable(values)))


def find_format(name: object) -> Format | None:
    """The format that a user means, by its name or its short one; None where it is neither."""
    if not isinstance(name, str) or not name:
        return None
    named = (format for format in FORMATS.values() if name in (format.name, format.short))
    return next(named, None)


def wished_format(name: object) -> Format:
    """`find_format`, for names that users write.

    Raises:
        RecipeError: no such format; the message suggests the closest name and lists all.
    """
    format = find_format(name)
    if format is None:
        raise RecipeError(unknown_format(name))
    return format


def read_as(name: object) -> Format | None:
    """The format that layers of this name are read as though none are written under it."""
    return next((format for format in FORMATS.values() if name in format.read_as), None)


def unknown_format(name: object) -> str:
    """That there is no such format, the closest name, and all names."""
    meant = (format.name for format in FORMATS.values() if name in (format.short, *format.called))
    guess = next(meant, None) or closest(str(name), (*FORMATS, *short_names()))
    hint = f", did you mean {guess!r}?" if guess else "."
    return f"unknown format {name!r}{hint} Allowed: {', '.join(FORMATS)}"


def short_names() -> tuple[str, ...]:
    """What users may write in place of a format's name."""
    return tuple(format.short for format in FORMATS.values() if format.short)


def own_methods(names: Iterable[str] = FORMATS) -> str:
    """What the formats' own methods are, in words: `nearest`, or `mse_clip for bnb_fp4, else
    nearest`.
    """
    others = [
        f"{FORMATS[name].method} for {name}"
        for name in names
        if FORMATS[name].method != Format.method
    ]
    return ", ".join([*others, f"else {Format.method}"] if others else [Format.method])
