"""ConvRot W4A4: INT4 codes of the rotated weight, one scale per row (FORMATS 3.7). Native."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...kernels.grids import INT4, decode
from ...kernels.hadamard import rotate
from ...kernels.packing import pack_nibbles, unpack_nibbles
from ...kernels.scales import Geometry
from ..errors import CheckpointError
from ..spec import FormatOptions, LayerInput, TensorSpec
from . import convrot
from .base import register_format, with_precision
from .tiled import TiledFormat

# ComfyUI's kernel needs K in multiples of this; it is no scale granularity and not stored
ALIGNMENT = 64
INT8_ROW = ("int8_tensorwise", FormatOptions(scaling="row"))


class ConvRotW4A4(TiledFormat):
    """`linear_dtype` int8 asks ComfyUI for 8-bit activations; the default int4 is not written."""

    name, min_comfyui, native = "convrot_w4a4", "0.28.0", True
    levels, dtype = INT4, "I8"
    choices = {"convrot_groupsize": convrot.WRITTEN, "linear_dtype": ("int4", "int8")}
    defaults = FormatOptions(convrot_groupsize=256, linear_dtype="int4")
    layout_options = ("convrot_groupsize",)

    def geometry(self, options: FormatOptions) -> Geometry:
        return Geometry(1, None)

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (shape[0],)

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        return 1, max(ALIGNMENT, options.convrot_groupsize)

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        k = layer.shape[1]
        if k % ALIGNMENT:
            return f"K={k} not divisible by {ALIGNMENT}"
        return convrot.refusal(layer, options.convrot_groupsize)

    def fallback(self, layer: LayerInput, options: FormatOptions) -> tuple[str, FormatOptions]:
        if layer.shape[1] % ALIGNMENT:
            return INT8_ROW
        return self.name, replace(options, convrot_groupsize=ALIGNMENT)

    def tensor_specs(
        self, layer: LayerInput, options: FormatOptions
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        n, k = layer.shape
        return {"weight": ("I8", (n, k // 2)), "weight_scale": ("F32", (n,))}

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        marker: dict = {"format": self.name, "convrot_groupsize": options.convrot_groupsize}
        if options.linear_dtype == "int8":
            marker["linear_dtype"] = "int8"
        return with_precision(marker, options)

    def stored_layer(self, marker: dict, specs: dict[str, TensorSpec]) -> LayerInput:
        n, half = self.stored_matrix(specs)
        return LayerInput((n, 2 * half), None)

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        linear_dtype = marker.get("linear_dtype", "int4")
        if linear_dtype not in self.choices["linear_dtype"]:
            raise CheckpointError(
                f"linear_dtype is {linear_dtype!r}, {self.name} allows int4 and int8"
            )
        return FormatOptions(
            convrot_groupsize=convrot.stored_group(marker, self.stored_layer(marker, specs)),
            linear_dtype=linear_dtype,
            full_precision_matrix_mult=marker.get("full_precision_matrix_mult", False),
        )

    def prepare(self, weight: torch.Tensor, options: FormatOptions) -> torch.Tensor:
        return rotate(weight, options.convrot_groupsize)

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        packed = pack_nibbles(codes, high_first=False).view(torch.int8)
        return {"weight": packed, "weight_scale": scale.reshape(-1)}

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        nibbles = unpack_nibbles(tensors["weight"], high_first=False).view(torch.int8)
        codes = (nibbles << 4) >> 4  # the upper bit of each nibble is its sign
        rotated = decode(codes, tensors["weight_scale"].view(-1, 1), INT4, self.geometry(options))
        return rotate(rotated, options.convrot_groupsize)


register_format(ConvRotW4A4())
