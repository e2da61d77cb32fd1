"""ConvRot W4A4: INT4 codes of the rotated weight, one scale per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.levels import INT4
from ...kernels.packing import pack_nibbles, unpack_nibbles
from ..errors import CheckpointError
from ..spec import LayerInput, TensorSpec
from .arrangement import Arrangement
from .base import FormatOptions, register_format, with_precision
from .chain import INT8_ROW, Next
from .convrot import LARGEST, READ, WRITTEN, refusal, stored_group
from .tiled import TiledFormat

# ComfyUI's kernel needs K in multiples of this; it is no scale granularity and not stored
ALIGNMENT = 64


class ConvRotW4A4(TiledFormat):
    """`linear_dtype` int8 asks ComfyUI for 8-bit activations; the default int4 is not written.

    Example with convrot_groupsize=16:

        4 0 x63

    is stored as

        weight I8 (1, 32): 77 97 77 97 77 97 99 79 00 x24
        weight_scale F32 (1): 25 49 12 3e
        comfy_quant: {"format": "convrot_w4a4", "convrot_groupsize": 16}
    """

    name, min_comfyui, native = "convrot_w4a4", "0.28.0", True
    levels, codes_per_byte = INT4, 2
    arrangements = (Arrangement.ROW,)
    layout_options = ("convrot_groupsize",)

    @dataclass(frozen=True)
    class Options(FormatOptions):
        convrot_groupsize: int = LARGEST
        linear_dtype: str = "int4"

        choices: ClassVar = {
            "convrot_groupsize": WRITTEN,
            "linear_dtype": ("int4", "int8"),
        }
        stored: ClassVar = {"convrot_groupsize": READ}

    def rotation(self, options: FormatOptions) -> int:
        return options.convrot_groupsize

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        return (shape[0],)

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        return 1, max(ALIGNMENT, options.convrot_groupsize)

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        k = layer.shape[1]
        if k % ALIGNMENT:
            return f"K={k} not divisible by {ALIGNMENT}"
        return refusal(layer, options.convrot_groupsize)

    def fallback(self, layer: LayerInput, options: FormatOptions) -> Next:
        if layer.shape[1] % ALIGNMENT:
            return INT8_ROW
        return self.name, {**options.as_dict(), "convrot_groupsize": ALIGNMENT}

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        marker: dict = {"format": self.name, "convrot_groupsize": options.convrot_groupsize}
        if options.linear_dtype == "int8":
            marker["linear_dtype"] = "int8"
        return with_precision(marker, options)

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> dict[str, object]:
        linear_dtype = marker.get("linear_dtype", "int4")
        if linear_dtype not in self.Options.values("linear_dtype"):
            raise CheckpointError(
                f"linear_dtype is {linear_dtype!r}, {self.name} allows int4 and int8"
            )
        group = stored_group(marker, self.stored_layer(marker, specs))
        return {"convrot_groupsize": group, "linear_dtype": linear_dtype}

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        packed = pack_nibbles(codes, high_first=False).view(torch.int8)
        return {"weight": packed, "weight_scale": scale.reshape(-1)}

    def codes(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        nibbles = unpack_nibbles(tensors["weight"], high_first=False).view(torch.int8)
        return (nibbles << 4) >> 4  # the upper bit of each nibble is its sign


register_format(ConvRotW4A4())
