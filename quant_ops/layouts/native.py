"""Our products for weights in comfy-kitchen's own layouts, where they were measured to be faster
than its kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from comfy_kitchen.tensor.base import LAYOUTS as REGISTERED
from comfy_kitchen.tensor.base import QuantizedTensor, get_layout_class, register_layout_op

from ...kernels import choice
from ...kernels.device import gpu_at, gpu_of
from ...kernels.dispatch import Op
from ...kernels.levels import E4M3, INT8
from ...kernels.rows import SPANS
from ...kernels.runtime import linear_mxfp8, linear_nvfp4, linear_rotated, linear_tiles
from ...kernels.scales import Geometry
from .pack import PackLayout
from .product import PRODUCTS, Product, Traced, multiply_at, own_product

WHOLE, ROWS = Geometry(None, None), Geometry(1, None)

Shape = tuple[int, int]
Call = tuple[Op, tuple]


def _int8(pieces: list[torch.Tensor], span: int) -> Call:
    codes, scale = pieces
    if span:
        return linear_rotated, (codes, scale.reshape(-1, 1), span)
    if scale.numel() == 1:
        return linear_tiles, (codes, scale.reshape(1, 1), INT8, WHOLE)
    return linear_tiles, (codes, scale.reshape(-1, 1), INT8, ROWS)


def _fp8(pieces: list[torch.Tensor], span: int) -> Call:
    codes, scale = pieces
    return linear_tiles, (codes, scale.reshape(1, 1), E4M3, WHOLE)


def _nvfp4(pieces: list[torch.Tensor], span: int) -> Call:
    packed, block, scale = pieces
    return linear_nvfp4, (packed, block.view(torch.float8_e4m3fn), scale.reshape(()))


def _mxfp8(pieces: list[torch.Tensor], span: int) -> Call:
    return linear_mxfp8, tuple(pieces)


def _int8_fits(codes: torch.Tensor, params: object, shape: Shape) -> bool:
    scale = params.scale
    if scale.numel() not in (1, len(codes)) or scale.dtype != torch.float32:
        return False
    return not span_of(params) or (scale.numel() == len(codes) and span_of(params) in SPANS)


def _fp8_fits(codes: torch.Tensor, params: object, shape: Shape) -> bool:
    scale = params.scale
    return codes.dtype == E4M3.dtype and scale.numel() == 1 and scale.dtype == torch.float32


def _nvfp4_fits(codes: torch.Tensor, params: object, shape: Shape) -> bool:
    return (codes.shape[0], 2 * codes.shape[1]) == shape


def _mxfp8_fits(codes: torch.Tensor, params: object, shape: Shape) -> bool:
    return tuple(codes.shape) == shape


def span_of(params: object) -> int:
    """Columns that a weight was rotated in; 0 where it was not."""
    if getattr(params, "convrot", False):
        return params.convrot_groupsize
    return 0


class Native(NamedTuple):
    """A layout of comfy-kitchen's.

    Attributes:
        kind: its name in `choice.BEATS_KITCHEN`.
        side: the fields of its params that a product takes.
        fits: whether codes, params and logical shape are what a product takes.
        call: op and arguments of a product, of the codes with the side tensors, and the span.
    """

    kind: str
    side: tuple[str, ...]
    fits: Callable[[torch.Tensor, object, Shape], bool]
    call: Callable[[list[torch.Tensor], int], Call]

    def pieces(self, weight: QuantizedTensor) -> list[torch.Tensor]:
        """Codes and side tensors."""
        return [weight._qdata, *(getattr(weight._params, name) for name in self.side)]


FP8 = Native("fp8", ("scale",), _fp8_fits, _fp8)
LAYOUTS = {
    "TensorWiseINT8Layout": Native("int8", ("scale",), _int8_fits, _int8),
    "TensorCoreFP8E4M3Layout": FP8,
    "TensorCoreFP8Layout": FP8,
    "TensorCoreNVFP4Layout": Native("e2m1", ("block_scale", "scale"), _nvfp4_fits, _nvfp4),
    "TensorCoreMXFP8Layout": Native("e4m3_mx", ("scale",), _mxfp8_fits, _mxfp8),
}


OFF = "FEWBITS_NATIVE_KERNELS"  # set to 0, comfy-kitchen multiplies its own formats everywhere


def product_of(weight: QuantizedTensor) -> Product | None:
    """What multiplies by a weight, in a layout of ours or of comfy-kitchen's; None where
    comfy-kitchen does.
    """
    if issubclass(weight.layout_cls, PackLayout):
        params = weight._params
        if params.transposed:
            return None
        return own_product(weight, tuple(params.orig_shape))
    return native_product(weight)


def traced(weight: QuantizedTensor) -> Traced | None:
    """A weight of ours or of comfy-kitchen's as plain tensors; None where its product is not ours
    to make.
    """
    params = weight._params
    if issubclass(weight.layout_cls, PackLayout):
        stored = weight.layout_cls.stored(weight._qdata, params)
        pieces = tuple(stored.values())
        shape = tuple(params.orig_shape)
        return None if params.transposed else Traced(pieces, weight._layout_cls, *shape, 0)
    found = taken(weight)
    if found is None:
        return None
    pieces = tuple(found.pieces(weight))
    return Traced(pieces, weight._layout_cls, *params.orig_shape, span_of(params))


def multiplies_native(weight: QuantizedTensor, device: torch.device) -> bool:
    """Whether a weight of comfy-kitchen's is multiplied by us on a device, as far as its layout and
    the device say.
    """
    return device.type == "cuda" and multiplies_layout(weight._layout_cls, device.index or 0)


@torch.compiler.assume_constant_result
def multiplies_layout(layout: str, index: int) -> bool:
    """Whether weights of a layout of comfy-kitchen's are multiplied by us on this GPU."""
    found = LAYOUTS.get(layout)
    if found is None or os.environ.get(OFF) == "0":
        return False
    return choice.beats_kitchen(found.kind, gpu_at(index))


def taken(weight: QuantizedTensor) -> Native | None:
    """The layout of a weight that our products take; None of others."""
    found, params = LAYOUTS.get(weight._layout_cls), weight._params
    if found is None or getattr(params, "transposed", False):
        return None
    if found.fits(weight._qdata, params, tuple(params.orig_shape)):
        return found
    return None


def native_product(weight: QuantizedTensor) -> Product | None:
    """Our product of a weight of comfy-kitchen's; None where its own is taken."""
    gpu, found = gpu_of(weight._qdata), taken(weight)
    if gpu is None or found is None or os.environ.get(OFF) == "0":
        return None
    if not choice.beats_kitchen(found.kind, gpu):
        return None
    params = weight._params
    call = found.call(found.pieces(weight), span_of(params))
    return Product(weight._qdata, tuple(params.orig_shape), *call)


def _product_from(layout: str, pieces: list[torch.Tensor], n: int, k: int, span: int) -> Product:
    return Product(pieces[0], (n, k), *LAYOUTS[layout].call(pieces, span))


PRODUCTS.update(dict.fromkeys(LAYOUTS, _product_from))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ W.T + bias by our product of a weight of comfy-kitchen's; where it takes no such weight,
    whatever torch finds for it.
    """
    if torch.compiler.is_compiling():  # an op of its own: aten's linear is taken apart
        return torch.ops.fewbits.multiply(x, weight, bias)
    return _multiply(x, weight, bias, multiply_at)


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, product: Callable
) -> torch.Tensor:
    ours = taken(weight) if isinstance(weight, QuantizedTensor) else None
    if ours is None:
        return torch.nn.functional.linear(x, weight, bias)
    params = weight._params
    shape, span = params.orig_shape, span_of(params)
    return product(x, ours.pieces(weight), weight._layout_cls, *shape, span, bias)


def _followed(qt: object, args: tuple, kwargs: dict) -> torch.Tensor:
    """`fewbits::multiply` of a quantized weight: the op on its pieces, which compilers follow."""
    return _multiply(*args, torch.ops.fewbits.linear)


for _layout in {get_layout_class(name) for name in LAYOUTS if name in REGISTERED}:
    register_layout_op(torch.ops.fewbits.multiply.default, _layout)(_followed)
