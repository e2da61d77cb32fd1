"""Format: names, dtypes, shapes and marker of a quantized layer on disk, all known from the input
shape alone.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch

from ...kernels.dispatch import Op
from ...kernels.grids import Grid, Scale
from ..errors import CheckpointError, RecipeError, closest
from ..spec import FormatOptions, LayerInput, TensorSpec

# What users write for a format name; suggested in errors, never accepted (FORMATS 7.5).
ALIASES = {"fp8": "float8_e4m3fn", "fp8_scaled": "float8_e4m3fn", "int8": "int8_tensorwise",
           "nf4": "bnb_nf4", "fp4": "bnb_fp4"}  # fmt: skip


class Format(ABC):
    """One on-disk format.

    Side tensors are `<base>.<suffix>`; `pack` and `unpack` use the suffix alone ("weight",
    "weight_scale"), so a format can be tested with two tensors and no file.
    """

    name: str
    min_comfyui: str
    native: bool
    method: str = "nearest"  # how codes are chosen where a wish names no method
    # since when ComfyUI reads it as an Embedding; None = never
    embedding_min_comfyui: str | None = None
    defaults = FormatOptions()
    # option name -> allowed values; an option not named here does not apply
    choices: dict[str, tuple] = {}
    # options that a runtime tensor must carry to be quantized again
    layout_options: tuple[str, ...] = ()

    def resolve(self, options: FormatOptions) -> FormatOptions:
        """Fill in defaults and refuse what does not apply.

        Raises:
            RecipeError: an option that the format does not have, or a value it does not allow.
        """
        for name, value in options.stated().items():
            if name == "full_precision_matrix_mult":
                continue
            if name not in self.choices:
                raise RecipeError(
                    f"format {self.name} has no option {name!r}; it allows: {self._allowed()}"
                )
            if value not in self.choices[name]:
                allowed = ", ".join(map(str, self.choices[name]))
                raise RecipeError(
                    f"format {self.name}: {name} must be one of {allowed}; got {value!r}"
                )
        return replace(self.defaults, **options.stated())

    def _allowed(self) -> str:
        return ", ".join([*self.choices, "full_precision_matrix_mult"])

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        """Why this (N, K) does not fit, in the exact words of FORMATS section 4; None when it
        does.
        """
        return None

    def fallback(
        self, layer: LayerInput, options: FormatOptions
    ) -> tuple[str, FormatOptions] | None:
        """The next format to try when `check` refuses (FORMATS section 4), or None to keep the
        layer.
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

    @abstractmethod
    def options_from(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        """Read the options of a stored layer back; shapes win over the marker.

        Raises:
            CheckpointError: stored dtypes or shapes do not fit the format.
        """

    def stored_layer(self, marker: dict, specs: dict[str, TensorSpec]) -> LayerInput:
        """The logical shape and source dtype of a stored layer."""
        return LayerInput(self.stored_matrix(specs), None)

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
        return weight

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
        """Stored tensors -> (N, K) float32, written apart from the encoder (FORMATS 2.6)."""

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
            if (got.dtype, tuple(got.shape)) != (dtype, shape):
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
    """The bytes of a `comfy_quant` tensor: JSON with Python's default separators (FORMATS 1.1)."""
    return json.dumps(marker).encode("utf-8")


def with_precision(marker: dict, options: FormatOptions) -> dict:
    """Append `full_precision_matrix_mult`, last and only when true (FORMATS 1.1)."""
    return (
        {**marker, "full_precision_matrix_mult": True}
        if options.full_precision_matrix_mult
        else marker
    )


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
    """Look a format up by its exact name.

    Raises:
        RecipeError: no such format; the message suggests the closest name and lists all.
    """
    if name not in FORMATS:
        guess = ALIASES.get(name) or closest(name, FORMATS)
        hint = f", did you mean {guess!r}?" if guess else "."
        raise RecipeError(f"unknown format {name!r}{hint} Allowed: {', '.join(FORMATS)}")
    return FORMATS[name]


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
