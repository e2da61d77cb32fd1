"""NVFP4 without JSON, where the user says that it is that.

| stored | becomes |
|---|---|
| `weight` U8 (N, K/2) | the same, nibbles swapped if the user says that the low one comes first |
| `weight_scale` F8_E4M3 (N, K/16), rows in order, or padded and swizzled | padded and swizzled |
| `weight_scale_2` F32 () | the same |
| `input_scale` F32 () | the same |

Two things are checked, as far as one layer shows them. The order of the scales: real weights have
rows and columns that are large as a whole, which the wrong order scatters. The size of the weights:
a tensor scale stored as its reciprocal makes them larger than any model's. The order of nibbles
does not show in a layer alone: a swap only exchanges neighbours within a block.
"""

from __future__ import annotations

import torch

from ....kernels.nvfp4 import BLOCK
from ....kernels.packing import swizzle_scales, swizzled_shape, unswizzle_scales
from ...errors import CheckpointError
from ...formats.nvfp4 import Nvfp4
from ...spec import LayerInput
from .base import ImportOptions, StoredLayer, Tensors, Translation, quantized
from .four_bit import swap_nibbles

# Share of the variance of log2(scale) that rows and columns leave unexplained: the right order must
# leave less than this share of what the wrong one leaves. Weights of equal spread everywhere
# (seeded normal, 256 x 1024) give 0.99 to 1.01; rows whose spread varies by 1.5 give 0.3.
CLEARLY = 0.9
# Root mean square of a layer's weights: trained ones lie between 1e-3 and 1.
LARGEST, SMALLEST = 30.0, 1e-6
PLAIN = "linear"
SWIZZLED = "swizzled"


def translate_bare_nvfp4(layer: StoredLayer, options: ImportOptions) -> Translation:
    """
    Raises:
        CheckpointError: shapes or values that are not those of NVFP4, scales whose order does not
            show, or no word about the order of nibbles.
    """
    n, half = layer.matrix
    k = 2 * half
    if options.nibble_order is None:
        raise CheckpointError(
            f"{Nvfp4.name} without JSON: which nibble comes first does not show; say it (files of "
            "NVIDIA's tools have the low one first, ComfyUI's the high one)",
            option="nibble_order",
        )
    order = _order_of_scales(layer, n, k)
    _refuse_implausible(layer, order, n, k)

    def convert(tensors: Tensors) -> Tensors:
        codes, scales = tensors["weight"], tensors["weight_scale"].view(torch.uint8)
        if options.nibble_order == "low":
            codes = swap_nibbles(codes)
        if order == PLAIN:
            scales = swizzle_scales(scales)
        return {
            "weight": codes,
            "weight_scale": scales,
            "weight_scale_2": tensors["weight_scale_2"],
        }

    source = LayerInput((n, k), None)
    return quantized(
        "blocks-without-json",
        layer,
        Nvfp4.name,
        source,
        options=Nvfp4.Options(),
        convert=convert,
        note=f"taken for {Nvfp4.name}, {options.nibble_order} nibble first, {order} scales",
        asked=("assume", "nibble_order"),
    )


def _order_of_scales(layer: StoredLayer, n: int, k: int) -> str:
    spec = layer.specs["weight_scale"]
    plain, swizzled = (n, k // BLOCK), swizzled_shape(n, k // BLOCK)
    if spec.dtype not in ("F8_E4M3", "U8") or k % BLOCK or spec.shape not in (plain, swizzled):
        raise CheckpointError(
            f"weight_scale is {spec.dtype} {list(spec.shape)}; {Nvfp4.name} of {n}x{k} has F8_E4M3 "
            f"{list(plain)} or, padded, {list(swizzled)}"
        )
    if plain != swizzled:
        if spec.shape == plain:
            return PLAIN
        return SWIZZLED
    stored = layer.read("weight_scale").cpu().view(torch.uint8)
    as_plain = _unexplained(stored)
    as_swizzled = _unexplained(unswizzle_scales(stored, n, k // BLOCK))
    if as_plain < CLEARLY * as_swizzled:
        return PLAIN
    if as_swizzled < CLEARLY * as_plain:
        return SWIZZLED
    raise CheckpointError(
        f"{Nvfp4.name} without JSON: the order of its block scales does not show in their values; "
        "make the file again from the original model"
    )


def _unexplained(scales: torch.Tensor) -> float:
    """Variance of log2(scale) that is neither its row's nor its column's."""
    grid = scales.contiguous().view(torch.float8_e4m3fn).double().abs().clamp_min(2.0**-10).log2()
    rest = grid - grid.mean(1, keepdim=True) - grid.mean(0, keepdim=True) + grid.mean()
    return float(rest.square().mean())


def _refuse_implausible(layer: StoredLayer, order: str, n: int, k: int) -> None:
    scales = layer.read("weight_scale").cpu().view(torch.uint8)
    if order == SWIZZLED:
        scales = unswizzle_scales(scales, n, k // BLOCK)
    values = scales.contiguous().view(torch.float8_e4m3fn).double()
    per_tensor = layer.number("weight_scale_2")
    if per_tensor is None:
        raise CheckpointError(
            f"weight_scale_2 is more than one number; {Nvfp4.name} has one per tensor"
        )
    # codes of a block reach 6, and half of that is their usual size
    size = 3 * abs(per_tensor) * float(values.square().mean().sqrt())
    if not SMALLEST < size < LARGEST and bool(values.any()):
        raise CheckpointError(
            f"taken for {Nvfp4.name} its weights would be about {size:.2g}, which no model's are: "
            "another format, or weight_scale_2 is a reciprocal; start from the original model"
        )
