"""Our products for weights in comfy-kitchen's own layouts, where they were measured to be faster
than its kernels.
"""

from __future__ import annotations

import os

import torch
from comfy_kitchen.tensor.base import QuantizedTensor

from ...kernels import choice
from ...kernels.device import gpu_at, gpu_of
from ...kernels.dispatch import Op
from ...kernels.levels import E4M3, INT8
from ...kernels.rows import SPANS
from ...kernels.runtime import linear_mxfp8, linear_nvfp4, linear_rotated, linear_tiles
from ...kernels.scales import Geometry
from .pack import PackLayout
from .product import Product, own_product

WHOLE, ROWS = Geometry(None, None), Geometry(1, None)

Found = tuple[Op, tuple] | None


def _int8(weight: QuantizedTensor) -> Found:
    codes, params = weight._qdata, weight._params
    scale = params.scale
    if scale.numel() not in (1, len(codes)) or scale.dtype != torch.float32:
        return None
    if getattr(params, "convrot", False):
        span = params.convrot_groupsize
        fits = scale.numel() == len(codes) and span in SPANS
        return (linear_rotated, (codes, scale.reshape(-1, 1), span)) if fits else None
    if scale.numel() == 1:
        return linear_tiles, (codes, scale.reshape(1, 1), INT8, WHOLE)
    return linear_tiles, (codes, scale.reshape(-1, 1), INT8, ROWS)


def _fp8(weight: QuantizedTensor) -> Found:
    codes, scale = weight._qdata, weight._params.scale
    if codes.dtype != E4M3.dtype or scale.numel() != 1 or scale.dtype != torch.float32:
        return None
    return linear_tiles, (codes, scale.reshape(1, 1), E4M3, WHOLE)


def _nvfp4(weight: QuantizedTensor) -> Found:
    packed, params = weight._qdata, weight._params
    if (packed.shape[0], 2 * packed.shape[1]) != tuple(params.orig_shape):
        return None
    block = params.block_scale.view(torch.float8_e4m3fn)
    return linear_nvfp4, (packed, block, params.scale.reshape(()))


def _mxfp8(weight: QuantizedTensor) -> Found:
    codes, params = weight._qdata, weight._params
    if tuple(codes.shape) != tuple(params.orig_shape):
        return None
    return linear_mxfp8, (codes, params.scale)


# comfy-kitchen's layout -> (the name in `choice.BEATS_KITCHEN`, the product of its weight)
LAYOUTS = {
    "TensorWiseINT8Layout": ("int8", _int8),
    "TensorCoreFP8E4M3Layout": ("fp8", _fp8),
    "TensorCoreFP8Layout": ("fp8", _fp8),
    "TensorCoreNVFP4Layout": ("e2m1", _nvfp4),
    "TensorCoreMXFP8Layout": ("e4m3_mx", _mxfp8),
}


OFF = "FEWBITS_NATIVE_KERNELS"  # set to 0, comfy-kitchen multiplies its own formats everywhere


def product_of(weight: QuantizedTensor) -> Product | None:
    """What multiplies by a weight, in a layout of ours or of comfy-kitchen's; None where
    comfy-kitchen does.
    """
    if issubclass(weight.layout_cls, PackLayout):
        params = weight._params
        return None if params.transposed else own_product(weight, tuple(params.orig_shape))
    return native_product(weight)


def multiplies_native(weight: QuantizedTensor, device: torch.device) -> bool:
    """Whether a weight of comfy-kitchen's is multiplied by us on a device, as far as its layout and
    the device say.
    """
    found = LAYOUTS.get(weight._layout_cls)
    if found is None or device.type != "cuda" or os.environ.get(OFF) == "0":
        return False
    return choice.beats_kitchen(found[0], gpu_at(device.index or 0))


def native_product(weight: QuantizedTensor) -> Product | None:
    """Our product of a weight of comfy-kitchen's; None where its own is taken."""
    if os.environ.get(OFF) == "0":
        return None
    gpu, found = gpu_of(weight._qdata), LAYOUTS.get(weight._layout_cls)
    if gpu is None or found is None or getattr(weight._params, "transposed", False):
        return None
    name, make = found
    if not choice.beats_kitchen(name, gpu):
        return None
    product = make(weight)
    shape = tuple(weight._params.orig_shape)
    return None if product is None else Product(weight._qdata, shape, *product)
