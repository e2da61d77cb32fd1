"""One layout per (format, options): a comfy_kitchen QuantizedTensor whose bytes are exactly the
format's own.

The layout's name carries the options (`FewBitsInt8Blockwise128`), because ComfyUI <= 0.26
requantizes by name alone.
"""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from functools import cached_property
from typing import ClassVar

import torch
from comfy_kitchen.tensor.base import (
    LAYOUTS,
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
)

from ..formats import Format, FormatOptions, get_format
from ..sources import DTYPE_NAMES
from ..spec import LayerInput
from .product import Prepared, Product, nobody_looks


@dataclass(frozen=True)
class PackParams(BaseLayoutParams):
    """A weight's side tensors, all as on disk; a layout's own `Params` name them."""

    TENSORS: ClassVar[tuple[str, ...]]

    def _tensor_fields(self) -> list[str]:
        return list(self.TENSORS)

    @cached_property
    def prepared(self) -> Prepared:
        """Where the product of this weight is kept."""
        return Prepared()


class PackLayout(QuantizedLayout):
    """Base of our layouts. `qdata` is the stored weight; `Params` holds every stored side tensor,
    all as on disk.

    `SIDE` maps the name on disk to the field (`weight_scale` or `absmax` -> `scale`). `orig_shape`
    is the logical shape, (K, N) once `transposed`; `orig_dtype` what `dequantize` returns.
    """

    FORMAT: Format
    OPTIONS: FormatOptions
    SIDE: dict[str, str]

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        scale: object = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        **kwargs: object,
    ) -> tuple[torch.Tensor, BaseLayoutParams]:
        """Quantize any 2-D float tensor with this layout's geometry; scales always come from the
        tensor.

        Args:
            tensor: (N, K); other ranks are flattened to two. Sizes that the format does not hold
                are zero-padded.
            scale: ignored: ComfyUI passes "recalculate", and a scale of another tensor would clip
                this one.
            stochastic_rounding: seed; 0 or None rounds to nearest even.
            inplace_ops, kwargs: accepted because ComfyUI passes them; the input is never changed.
        """
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor
        padded = _pad(rows, cls._stored_layer(tuple(rows.shape)).shape)
        grid = cls.FORMAT.grid(
            LayerInput(tuple(padded.shape), DTYPE_NAMES[padded.dtype]), cls.OPTIONS
        )
        padded = cls.FORMAT.prepare(padded, cls.OPTIONS)
        stored = cls.FORMAT.quantize(padded, grid, cls.OPTIONS, stochastic_rounding or 0)
        return stored["weight"], cls.params_of(stored, tensor.dtype, tuple(rows.shape))

    @classmethod
    def params_of(
        cls, stored: dict[str, torch.Tensor], orig_dtype: torch.dtype, orig_shape: tuple[int, ...]
    ) -> BaseLayoutParams:
        """Params from stored tensors by their names on disk; nothing is copied or converted."""
        side = {field: stored[suffix] for suffix, field in cls.SIDE.items()}
        return cls.Params(**side, orig_dtype=orig_dtype, orig_shape=orig_shape)

    @classmethod
    def stored(cls, qdata: torch.Tensor, params: BaseLayoutParams) -> dict[str, torch.Tensor]:
        """Name on disk -> tensor; the inverse of `params_of`."""
        return {
            "weight": qdata,
            **{suffix: getattr(params, field) for suffix, field in cls.SIDE.items()},
        }

    @classmethod
    def _stored_layer(cls, shape: tuple[int, ...]) -> LayerInput:
        n, k = shape
        step_n, step_k = cls.FORMAT.steps(cls.OPTIONS)
        return LayerInput((-(-n // step_n) * step_n, -(-k // step_k) * step_k), None)

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: BaseLayoutParams) -> torch.Tensor:
        """Contiguous (N, K) in `orig_dtype`: float32 arithmetic, rounded once, padding cut off;
        never transposed.
        """
        n, k = params.orig_shape[::-1] if params.transposed else params.orig_shape
        pieces = list(cls.stored(qdata, params).values())
        if nobody_looks(qdata):
            return cls.decode(pieces, n, k, params.orig_dtype)
        return torch.ops.fewbits.dequantize(pieces, cls.__name__, n, k, params.orig_dtype)

    @classmethod
    def decode(cls, pieces: list[torch.Tensor], n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """What `fewbits::dequantize` computes; `pieces` are the weight and the side tensors in
        `SIDE` order.
        """
        stored = dict(zip(("weight", *cls.SIDE), pieces, strict=True))
        values = cls.FORMAT.dequantize_to(stored, cls._stored_layer((n, k)), cls.OPTIONS, dtype)
        return values[:n, :k].contiguous()

    @classmethod
    def product(cls, pieces: list[torch.Tensor], n: int, k: int) -> Product:
        """How x is multiplied by a weight; padded ones are decoded and cut."""
        layer, stored = (
            cls._stored_layer((n, k)),
            dict(zip(("weight", *cls.SIDE), pieces, strict=True)),
        )
        found = cls.FORMAT.product(stored, layer, cls.OPTIONS) if layer.shape == (n, k) else None
        return Product(pieces[0], (n, k), *(found or (cls._decoded, (pieces, n, k))))

    @classmethod
    def _decoded(
        cls,
        rows: torch.Tensor,
        pieces: list[torch.Tensor],
        n: int,
        k: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.nn.functional.linear(rows, cls.decode(pieces, n, k, rows.dtype), bias)

    @classmethod
    def rows(
        cls, qdata: torch.Tensor, params: BaseLayoutParams, index: torch.Tensor, dtype: torch.dtype
    ):
        """Decode only the rows that an embedding looks up; for formats whose scales are one, or one
        per row.

        Args:
            index: (M,) int64.

        Returns:
            (M, K) `dtype`, equal to those rows of `dequantize`.
        """
        n, k = params.orig_shape
        picked = {
            suffix: _take(tensor, index) if tensor.dim() and tensor.shape[0] == n else tensor
            for suffix, tensor in cls.stored(qdata, params).items()
        }
        return cls.FORMAT.dequantize_to(
            picked, LayerInput((index.numel(), k), None), cls.OPTIONS, dtype
        )

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return tuple(cls.stored(qtensor._qdata, qtensor._params).values())

    @classmethod
    def state_dict_tensors(
        cls, qdata: torch.Tensor, params: BaseLayoutParams
    ) -> dict[str, torch.Tensor]:
        """Suffix to append to `<layer>.weight`; names that do not start with `weight` get an
        underscore here.
        """
        return {
            name.removeprefix("weight") if name.startswith("weight") else f"_{name}": tensor
            for name, tensor in cls.stored(qdata, params).items()
        }

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        """False: ComfyUI would quantize activations with the weight's layout."""
        return False


def _make_layout(name: str, format: Format, options: FormatOptions) -> type[PackLayout]:
    """The layout class of one format with one set of options."""
    suffixes = [suffix for suffix in format.dtypes if suffix != "weight"]
    side = {suffixes[0]: "scale", **{suffix: suffix for suffix in suffixes[1:]}}
    tensors = list(side.values())
    params = make_dataclass(
        "Params",
        [*((field, torch.Tensor) for field in tensors[1:]), ("transposed", bool, False)],
        bases=(PackParams,),
        namespace={"TENSORS": tuple(tensors)},
        frozen=True,
    )
    return type(
        name, (PackLayout,), {"FORMAT": format, "OPTIONS": options, "SIDE": side, "Params": params}
    )


def _pad(rows: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    missing = shape[0] - rows.shape[0], shape[1] - rows.shape[1]
    if any(missing):
        return torch.nn.functional.pad(rows, (0, missing[1], 0, missing[0]))
    return rows


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows by number; torch cannot index every 8-bit float type."""
    if tensor.itemsize == 1:
        return tensor.view(torch.uint8)[index].view(tensor.dtype)
    return tensor[index]


def layout_name(format: Format, options: FormatOptions) -> str:
    """`int8_blockwise`, block_size 128 -> `FewBitsInt8Blockwise128`; `...Precise` where activations
    are left alone.
    """
    parts = [part[:1].upper() + part[1:] for part in format.name.split("_")]
    extras = [
        str(value).capitalize()
        for name, value in options.stated().items()
        if name in format.layout_options
    ]
    if options.full_precision_matrix_mult and not format.Options().full_precision_matrix_mult:
        extras.append("Precise")
    return "FewBits" + "".join(parts) + "".join(extras)


def register_layout(format_name: str, options: FormatOptions) -> str:
    """Make and register the layout class of a format with these options, once; returns its name."""
    format = get_format(format_name)
    name = layout_name(format, options)
    if name not in LAYOUTS:
        register_layout_class(name, _make_layout(name, format, options))
    return name
