"""Formats whose scales form a grid of tiles: every FP8 and INT8 format is one `TiledFormat` with
its own numbers.
"""

from __future__ import annotations

import torch

from ...kernels.dispatch import Op
from ...kernels.grids import E4M3, INT8, Levels, TiledGrid, decode
from ...kernels.runtime import dequantize_tiles, linear_tiles
from ...kernels.scales import Geometry
from ..errors import CheckpointError
from ..spec import FormatOptions, LayerInput, TensorSpec
from .base import Format, with_precision

MIN_GROUP = 64  # elements along K; shorter groups leave the tensor cores waiting for scales


class TiledFormat(Format):
    """weight (N, K) codes plus `weight_scale` float32. Subclasses say geometry, stored scale shape
    and marker.
    """

    levels: Levels
    dtype: str  # safetensors dtype of the codes

    def geometry(self, options: FormatOptions) -> Geometry:
        raise NotImplementedError

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        """Stored shape of `weight_scale`; the grid shape unless a format says otherwise."""
        return self.geometry(options).grid_shape(shape)

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        geometry = self.geometry(options)
        return geometry.rows or 1, geometry.cols or 1

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        for axis, size, step in zip("NK", layer.shape, self.steps(options), strict=True):
            if size % step:
                return f"{axis}={size} not divisible by {step}"
        return None

    def tensor_specs(
        self, layer: LayerInput, options: FormatOptions
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            "weight": (self.dtype, layer.shape),
            "weight_scale": ("F32", self.scale_shape(layer.shape, options)),
        }

    def grid(self, layer: LayerInput, options: FormatOptions) -> TiledGrid:
        return TiledGrid(self.levels, self.geometry(options))

    def pack(
        self, codes: torch.Tensor, scale: torch.Tensor, options: FormatOptions
    ) -> dict[str, torch.Tensor]:
        return {
            "weight": codes,
            "weight_scale": scale.reshape(self.scale_shape(tuple(codes.shape), options)),
        }

    def dequantize(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> torch.Tensor:
        codes, geometry = tensors["weight"], self.geometry(options)
        scale = tensors["weight_scale"].reshape(geometry.grid_shape(tuple(codes.shape)))
        return decode(codes, scale, self.levels, geometry)

    def dequantize_to(
        self,
        tensors: dict[str, torch.Tensor],
        layer: LayerInput,
        options: FormatOptions,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        codes, geometry = tensors["weight"], self.geometry(options)
        if tuple(codes.shape) != layer.shape or options.convrot:
            # packed or rotated: more than codes x scales
            return super().dequantize_to(tensors, layer, options, dtype)
        scale = tensors["weight_scale"].reshape(geometry.grid_shape(layer.shape))
        return dequantize_tiles(codes, scale, self.levels, geometry, dtype)

    def multiplies_codes(self, options: FormatOptions) -> bool:
        """Whether `product` quantizes activations too; else it decodes the weight and leaves them
        as they are.

        Not where the marker asks for full precision, the codes are of a rotated weight, products of
        the codes do not exist (e5m2) or groups along K are shorter than a step of the tensor cores.
        """
        cols = self.geometry(options).cols
        asked_not_to = options.full_precision_matrix_mult or options.convrot
        return (
            self.levels in (INT8, E4M3) and not asked_not_to and (cols is None or cols >= MIN_GROUP)
        )

    def product(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> tuple[Op, tuple] | None:
        codes, geometry = tensors["weight"], self.geometry(options)
        if not self.multiplies_codes(options) or tuple(codes.shape) != layer.shape:
            return None
        scale = tensors["weight_scale"].reshape(geometry.grid_shape(layer.shape))
        return linear_tiles, (codes, scale, self.levels, geometry)

    def options_from(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        options = self.stored_options(marker, specs)
        self.refuse_misfit(self.stored_layer(marker, specs), options, specs)
        return options

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        """Options as the marker and the scale's shape state them."""
        return self.resolve(
            FormatOptions(
                full_precision_matrix_mult=marker.get("full_precision_matrix_mult", False)
            )
        )


class BlockFormat(TiledFormat):
    """A tiled format with a block size, which the marker states twice (older readers know one place
    or the other).
    """

    native, min_comfyui = False, "0.8.0"
    layout_options = ("block_size",)
    two_dimensional: bool  # bs x bs tiles, or 1 x bs groups along K
    instead: tuple[str, FormatOptions]  # what to use where the block size does not divide

    def geometry(self, options: FormatOptions) -> Geometry:
        return Geometry(options.block_size if self.two_dimensional else 1, options.block_size)

    def fallback(self, layer: LayerInput, options: FormatOptions) -> tuple[str, FormatOptions]:
        return self.instead

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        size = options.block_size
        return with_precision(
            {"format": self.name, "group_size": size, "params": {"group_size": size}}, options
        )

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> FormatOptions:
        (_, k), scale = self.stored_matrix(specs), specs.get("weight_scale")
        if scale is None or len(scale.shape) < 2 or not scale.shape[1]:
            raise CheckpointError(
                f"weight_scale is missing or not a grid; {self.name} needs one scale per block"
            )
        size = k // scale.shape[1]
        precise = marker.get("full_precision_matrix_mult", False)
        return self.resolve(FormatOptions(block_size=size, full_precision_matrix_mult=precise))
