"""Block formats of tensor cores: N and K are zero-padded to whole blocks, block scales are stored
swizzled.
"""

from __future__ import annotations

import torch

from ...kernels.packing import pad_to, round_up, swizzled_shape
from ..errors import CheckpointError
from ..spec import LayerInput, TensorSpec
from .base import Format, FormatOptions, dtype_from_json, dtype_to_json, with_precision
from .chain import FP8_TENSOR, Next


class PaddedFormat(Format):
    """Blocks of `block` along K; (N, K) is padded to multiples of `block` in both directions.

    `codes_per_byte` codes share a stored byte.
    """

    native, swizzled = True, True
    block: int
    weight_dtype: str
    scale_dtype: str

    def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        n, k = shape
        return round_up(n, self.block), round_up(k, self.block)

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        (n, k), (rows, cols) = layer.shape, self.padded(layer.shape)
        if 4 * rows * cols > 5 * n * k:
            return f"padding {n}x{k} -> {rows}x{cols} adds more than 25 %"
        return None

    def fallback(self, layer: LayerInput, options: FormatOptions) -> Next:
        return FP8_TENSOR

    def notes(self, layer: LayerInput, options: FormatOptions) -> tuple[str, ...]:
        (n, k), (rows, cols) = layer.shape, self.padded(layer.shape)
        if (n, k) == (rows, cols):
            return ()
        slow = ("runs dequantized in ComfyUI",) if layer.bias and n != rows else ()
        return (f"padded {n}x{k} -> {rows}x{cols}", *slow)

    def tensor_specs(
        self, layer: LayerInput, options: FormatOptions
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        rows, cols = self.padded(layer.shape)
        return {
            "weight": (self.weight_dtype, (rows, cols // self.codes_per_byte)),
            "weight_scale": (self.scale_dtype, swizzled_shape(rows, cols // self.block)),
        }

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        """`orig_dtype` and `orig_shape` are left out for a stored layer that did not say them."""
        marker: dict = {
            "format": self.name,
            "group_size": self.block,
            "params": {"group_size": self.block},
        }
        if layer.dtype:
            marker |= {"orig_dtype": dtype_to_json(layer.dtype), "orig_shape": list(layer.shape)}
        return with_precision(marker, options)

    def stored_layer(self, marker: dict, specs: dict[str, TensorSpec]) -> LayerInput:
        rows, cols = self.stored_matrix(specs)
        storage = (rows, cols * self.codes_per_byte)
        stated = marker.get("orig_shape")
        if stated is None:
            return LayerInput(storage, None)
        numbers = isinstance(stated, list) and [type(size) for size in stated] == [int, int]
        if not numbers or self.padded(stated) != storage:
            raise CheckpointError(
                f"orig_shape is {stated}, but the stored weight holds {list(storage)}"
            )
        return LayerInput(tuple(stated), dtype_from_json(marker.get("orig_dtype")))

    def prepare(self, weight: torch.Tensor, options: FormatOptions) -> torch.Tensor:
        return pad_to(weight, *self.padded(tuple(weight.shape)))
