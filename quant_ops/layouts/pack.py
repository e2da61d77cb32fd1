"""One layout per (format, options): a comfy_kitchen QuantizedTensor whose bytes are exactly the format's own.

The layout's name carries the options (`FewBitsInt8Blockwise128`), because ComfyUI <= 0.26 requantizes by name alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor.base import (
    LAYOUTS,
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    register_layout_class,
    register_layout_op,
)

from ..errors import UnsupportedLayerError
from ..formats import get_format
from ..formats.base import Format
from ..sources import DTYPE_NAMES
from ..spec import FormatOptions, LayerInput


class PackLayout(QuantizedLayout):
    """Base of our layouts. `qdata` is the stored weight, `scale` the stored side tensor, both as on disk.

    `orig_shape` is the logical shape, (K, N) once `transposed`; `orig_dtype` what `dequantize` returns.
    """

    FORMAT: Format
    OPTIONS: FormatOptions

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        transposed: bool = False

    @classmethod
    def quantize(
        cls,
        tensor: torch.Tensor,
        scale: object = None,
        stochastic_rounding: int | None = 0,
        inplace_ops: bool = False,
        **kwargs: object,
    ) -> tuple[torch.Tensor, Params]:
        """Quantize any 2-D float tensor with this layout's geometry; scales always come from the tensor.

        Args:
            tensor: (N, K); other ranks are flattened to two. Sizes that the blocks do not divide are zero-padded.
            scale: ignored: ComfyUI passes "recalculate", and a scale of another tensor would clip this one.
            stochastic_rounding: seed; 0 or None rounds to nearest even.
            inplace_ops, kwargs: accepted because ComfyUI passes them; the input is never changed.
        """
        rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor
        padded = _pad(rows, cls.FORMAT, cls.OPTIONS)
        grid = cls.FORMAT.grid(LayerInput(tuple(padded.shape), DTYPE_NAMES[padded.dtype]), cls.OPTIONS)
        padded = cls.FORMAT.prepare(padded, cls.OPTIONS)
        found = grid.scale(padded)
        codes = grid.encode(padded, found, seed=stochastic_rounding or 0)
        stored = cls.FORMAT.pack(codes, found, cls.OPTIONS)
        return stored["weight"], cls.Params(stored["weight_scale"], tensor.dtype, tuple(rows.shape))

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: Params) -> torch.Tensor:
        """(N, K) in `orig_dtype`: float32 arithmetic, rounded once; `transposed` is the caller's business."""
        stored = {"weight": qdata, "weight_scale": params.scale}
        layer = LayerInput(params.orig_shape[::-1] if params.transposed else params.orig_shape, None)
        return cls.FORMAT.dequantize(stored, layer, cls.OPTIONS).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: Params) -> dict[str, torch.Tensor]:
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        """False: ComfyUI would quantize activations with the weight's layout."""
        return False


def _pad(rows: torch.Tensor, format: Format, options: FormatOptions) -> torch.Tensor:
    step_n, step_k = format.steps(options)
    n, k = rows.shape
    missing = (-k % step_k, -n % step_n)
    return torch.nn.functional.pad(rows, (0, missing[0], 0, missing[1])) if any(missing) else rows


def layout_name(format: Format, options: FormatOptions) -> str:
    """`int8_blockwise`, block_size 128 -> `FewBitsInt8Blockwise128`."""
    parts = [part[:1].upper() + part[1:] for part in format.name.split("_")]
    options = format.resolve(options)
    extras = [str(value).capitalize() for name, value in options.stated().items() if name in format.layout_options]
    return "FewBits" + "".join(parts) + "".join(extras)


def register_layout(format_name: str, options: FormatOptions) -> str:
    """Make and register the layout class of a format with these options, once; returns its name."""
    format = get_format(format_name)
    options = format.resolve(options)
    name = layout_name(format, options)
    if name not in LAYOUTS:
        register_layout_class(name, type(name, (PackLayout,), {"FORMAT": format, "OPTIONS": options}))
    return name


def _plain(value: object, dtype: torch.dtype) -> object:
    """A tensor in the input's dtype; a quantized one is dequantized straight to it."""
    if isinstance(value, QuantizedTensor):
        return value.to(dtype).dequantize()
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


@register_layout_op(torch.ops.aten.linear.default, PackLayout)
def _linear(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    return torch.nn.functional.linear(*(_plain(value, x.dtype) for value in (x, weight, bias)), **kwargs)


@register_layout_op(torch.ops.aten.mm.default, PackLayout)
def _mm(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    return torch.mm(_plain(args[0], args[0].dtype), _plain(args[1], args[0].dtype))


@register_layout_op(torch.ops.aten.addmm.default, PackLayout)
def _addmm(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    dtype = args[1].dtype
    return torch.addmm(*(_plain(value, dtype) for value in args[:3]), **kwargs)


@register_layout_op(torch.ops.aten.t.default, PackLayout)
def _t(qt: QuantizedTensor, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = qt._params
    flipped = dataclasses.replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(qt._qdata, qt._layout_cls, flipped)


def _refuse_in_place(qt: object, args: tuple, kwargs: dict) -> None:
    raise UnsupportedLayerError(
        "a quantized weight cannot be changed in place: the change would be lost. Dequantize it, change the copy and "
        "quantize again (ComfyUI's set_weight does)"
    )


# The generic fallback would change a dequantized copy and drop it.
for _op in ("add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "add_.Scalar", "sub_.Scalar", "mul_.Scalar",
            "div_.Scalar", "zero_.default", "fill_.Scalar", "addmm_.default", "clamp_.default", "lerp_.Scalar"):  # fmt: skip
    _packet, _overload = _op.split(".")
    register_layout_op(getattr(getattr(torch.ops.aten, _packet), _overload), PackLayout)(_refuse_in_place)

