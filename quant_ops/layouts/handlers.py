"""What torch's own ops do with our weights: products by our kernels, all else on decoded values,
and nothing in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from comfy_kitchen.tensor.base import QuantizedTensor, register_layout_op

from ..errors import UnsupportedLayerError
from .pack import PackLayout
from .product import FLOATS, nobody_looks, own_product


def _plain(value: object, dtype: torch.dtype) -> object:
    """A tensor in the input's dtype; a quantized one is dequantized straight to it."""
    if isinstance(value, QuantizedTensor):
        return value.to(dtype).dequantize()
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    return value


def _is_own(value: object) -> bool:
    return isinstance(value, QuantizedTensor) and issubclass(value.layout_cls, PackLayout)


@register_layout_op(torch.ops.aten.linear.default, PackLayout)
def _linear(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    bias = _plain(bias, x.dtype)
    if not _multiplies(x, weight) or weight._params.transposed:
        return torch.nn.functional.linear(_plain(x, x.dtype), _plain(weight, x.dtype), bias)
    return _product(x, weight, weight._params.orig_shape, bias)


def _multiplies(x: torch.Tensor, weight: object) -> bool:
    return not isinstance(x, QuantizedTensor) and _is_own(weight) and x.dtype in FLOATS


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear`, less the 8 us in which torch finds `_linear` where nothing
    records or traces.
    """
    if (
        torch.is_grad_enabled()
        or not nobody_looks(x)
        or not _multiplies(x, weight)
        or weight._params.transposed
    ):
        return torch.nn.functional.linear(x, weight, bias)
    return _product(x, weight, weight._params.orig_shape, _plain(bias, x.dtype))


def _product(
    x: torch.Tensor, weight: QuantizedTensor, shape: tuple[int, int], bias: torch.Tensor | None
):
    qdata, params = weight._qdata, weight._params
    if not (nobody_looks(x) and nobody_looks(qdata)):
        cls = weight.layout_cls
        return torch.ops.fewbits.linear(
            x, list(cls.stored(qdata, params).values()), cls.__name__, *shape, 0, bias
        )
    return own_product(weight, shape)(x, bias)


@register_layout_op(torch.ops.aten.mm.default, PackLayout)
def _mm(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    x, weight = args
    # what a linear becomes where gradients are recorded
    if _multiplies(x, weight) and weight._params.transposed:
        return _product(x, weight, tuple(weight.shape[::-1]), None)
    return torch.mm(_plain(x, x.dtype), _plain(weight, x.dtype))


@register_layout_op(torch.ops.aten.addmm.default, PackLayout)
def _addmm(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    bias, x, weight = args[:3]
    dtype = x.dtype
    if _multiplies(x, weight) and weight._params.transposed and bias.dim() == 1 and not kwargs:
        return _product(x, weight, tuple(weight.shape[::-1]), _plain(bias, dtype))
    return torch.addmm(*(_plain(value, dtype) for value in args[:3]), **kwargs)


@register_layout_op(torch.ops.aten.t.default, PackLayout)
def _t(qt: QuantizedTensor, args: tuple, kwargs: dict) -> QuantizedTensor:
    params = qt._params
    flipped = replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(qt._qdata, qt._layout_cls, flipped)


@register_layout_op(torch.ops.aten.view.default, PackLayout)
def _view(qt: QuantizedTensor, args: tuple, kwargs: dict) -> torch.Tensor:
    """Decoded values; those of a transposed weight lie in columns, which only `reshape` brings into
    rows.
    """
    return args[0].dequantize().reshape(args[1])


def _refuse_in_place(qt: object, args: tuple, kwargs: dict) -> None:
    raise UnsupportedLayerError(
        "a quantized weight cannot be changed in place: the change would be lost. Dequantize it, "
        "change the copy and quantize again (ComfyUI's set_weight does)"
    )


def _in_place_ops() -> Iterator[torch._ops.OpOverload]:
    """Every aten op that writes into its first argument; `copy_` has a handler, `detach_` changes
    no value.
    """
    for name in torch._C._dispatch_get_all_op_names():
        space, _, name = name.partition("::")
        packet, _, overload = name.partition(".")
        if (
            space != "aten"
            or not packet.endswith("_")
            or packet in ("copy_", "detach_", "requires_grad_")
        ):
            continue
        op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        arguments = op._schema.arguments if op else ()  # torch lists some that Python cannot call
        if arguments and arguments[0].alias_info and arguments[0].alias_info.is_write:
            yield op


# The generic fallback would change a dequantized copy and drop it.
for _op in _in_place_ops():
    register_layout_op(_op, PackLayout)(_refuse_in_place)
