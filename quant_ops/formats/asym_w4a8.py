"""W4A8: 4-bit codes that decode to an INT8 grid of the rotated weight.

Despite the name `asym_w4a8_int8` the symmetric form is written, with comfy-kitchen's fixed table of
levels: its fast decoder accepts no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.dispatch import Op
from ...kernels.packing import pack_nibbles, unpack_nibbles
from ...kernels.rows import SPANS
from ...kernels.runtime import linear_w4a8
from ...kernels.w4a8 import GROUP, LEVELS, W4A8Grid, W4A8Scale, dequantize_w4a8
from ..errors import CheckpointError
from ..spec import LayerInput, TensorSpec
from .base import Format, FormatOptions, register_format, with_precision
from .chain import INT8_ROW, Next
from .convrot import LARGEST, READ, WRITTEN, refusal, smaller_group, stored_group

STORED = ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook")


class AsymW4A8(Format):
    """The low nibble comes first; `weight_codebook` holds the table.

    Example with convrot_groupsize=16:

        4 0 x15

    is stored as

        weight I8 (1, 8): ff 0f ff 0f ff 0f 00 f0
        weight_s_rel F8_E4M3 (1, 1): 70
        weight_s_channel F32 (1): e2 02 01 3c
        weight_codebook F32 (16): bc 08 7b bf 41 66 4b bf c8 5e 23 bf 9e 40 00 bf 38 30 c1
            be 72 c0 86 be 5f ef 1e be c6 bf 4f bd 3b 35 57 3d ad c0 20 3e 4e d3 87 3e 26 52
            c2 3e c1 ac 00 3f 6c 92 23 3f fe 7c 4b 3f 41 0d 7b 3f
        comfy_quant: {"format": "asym_w4a8_int8", "group_size": 16, "params": {"group_size":
            16}, "convrot_groupsize": 16}
    """

    name, min_comfyui, native = "asym_w4a8_int8", "0.31.0", True
    stores = f"one scale per {GROUP} weights of a row, in steps of one per row"
    codes_per_byte = 2
    layout_options = ("convrot_groupsize",)

    @dataclass(frozen=True)
    class Options(FormatOptions):
        convrot_groupsize: int = LARGEST

        choices: ClassVar = {"convrot_groupsize": WRITTEN}
        stored: ClassVar = {"convrot_groupsize": READ}

    def rotation(self, options: FormatOptions) -> int:
        return options.convrot_groupsize

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        k = layer.shape[1]
        if k % GROUP:
            return f"K={k} not divisible by {GROUP}"
        return refusal(layer, options.convrot_groupsize)

    def fallback(self, layer: LayerInput, options: FormatOptions) -> Next:
        smaller = smaller_group(layer, options.convrot_groupsize)
        if smaller is None:
            return INT8_ROW
        return self.name, {**options.as_dict(), "convrot_groupsize": smaller}

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        return 1, max(GROUP, options.convrot_groupsize)

    def tensor_specs(
        self, layer: LayerInput, options: FormatOptions
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        n, k = layer.shape
        return {
            "weight": ("I8", (n, k // 2)),
            "weight_s_rel": ("F8_E4M3", (n, k // GROUP)),
            "weight_s_channel": ("F32", (n,)),
            "weight_codebook": ("F32", (len(LEVELS),)),
        }

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        marker = {
            "format": self.name,
            "group_size": GROUP,
            "params": {"group_size": GROUP},
            "convrot_groupsize": options.convrot_groupsize,
        }
        return with_precision(marker, options)

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> dict[str, object]:
        if "weight_correction" in specs:
            raise CheckpointError(f"weight_correction is there; {self.name} of FewBits has none")
        group = stored_group(marker, self.stored_layer(marker, specs))
        return {"convrot_groupsize": group}

    def grid(self, layer: LayerInput, options: FormatOptions) -> W4A8Grid:
        return W4A8Grid()

    def pack(
        self, codes: torch.Tensor, scale: W4A8Scale, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        return {
            "weight": pack_nibbles(codes, high_first=False).view(torch.int8),
            "weight_s_rel": scale.relative,
            "weight_s_channel": scale.channel,
            "weight_codebook": torch.tensor(LEVELS, dtype=torch.float32, device=codes.device),
        }

    def codes(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return unpack_nibbles(tensors["weight"], high_first=False)

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        return self.dequantize_to(tensors, layer, options, torch.float32)

    def dequantize_to(
        self,
        tensors: dict[str, torch.Tensor],
        layer: LayerInput,
        options: FormatOptions,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        stored = (tensors[name] for name in STORED)
        return dequantize_w4a8(*stored, options.convrot_groupsize, dtype)

    def product(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> tuple[Op, tuple] | None:
        span = options.convrot_groupsize
        if options.full_precision_matrix_mult or span not in SPANS:
            return None
        stored = (tensors[name] for name in STORED)
        return linear_w4a8, (*stored, span)


register_format(AsymW4A8())
