"""Formats whose scales form a grid of tiles: every FP8 and INT8 format is one `TiledFormat` with
its own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...kernels.dispatch import Op
from ...kernels.grids import TiledGrid, decode
from ...kernels.hadamard import rotate
from ...kernels.levels import E4M3, INT8, Levels
from ...kernels.runtime import dequantize_tiles, linear_tiles
from ...kernels.scales import Geometry
from ..errors import CheckpointError
from ..sources import DTYPE_NAMES
from ..spec import LayerInput, TensorSpec
from .arrangement import Arrangement
from .base import Format, FormatOptions, with_precision
from .chain import Next

MIN_GROUP = 64  # elements along K; shorter groups leave the tensor cores waiting for scales
BLOCK_SIZES = (16, 32, 64, 128, 256)


class TiledFormat(Format):
    """weight (N, K) codes plus `weight_scale` float32; w ~ code * scale.

    A subclass states levels, arrangements and, where it is not the grid's own, the stored shape of
    the scale.
    """

    levels: Levels

    @property
    def unused_code(self) -> int | None:
        """Of integers the one below -qmax: never written, so that every code has its opposite."""
        if self.levels.dtype.is_floating_point:
            return None
        return -int(self.levels.qmax) - 1

    @property
    def stores(self) -> str:
        first, *others = (arrangement.words for arrangement in self.arrangements)
        return ", or ".join([first, *(words.replace("one scale", "one") for words in others)])

    def arrangement(self, options: FormatOptions) -> Arrangement:
        """How these options share scales."""
        if len(self.arrangements) == 1:
            return self.arrangements[0]
        return Arrangement(options.scaling)

    def geometry(self, options: FormatOptions) -> Geometry:
        return self.arrangement(options).geometry(getattr(options, "block_size", None))

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        """Stored shape of `weight_scale`: () for one scale, else the grid's, unless a format says
        otherwise.
        """
        if self.arrangement(options) is Arrangement.TENSOR:
            return ()
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
        n, k = layer.shape
        return {
            "weight": (DTYPE_NAMES[self.levels.dtype], (n, k // self.codes_per_byte)),
            "weight_scale": ("F32", self.scale_shape(layer.shape, options)),
        }

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        return with_precision({"format": self.name}, options)

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
        codes, geometry = self.codes(tensors), self.geometry(options)
        scale = tensors["weight_scale"].reshape(geometry.grid_shape(tuple(codes.shape)))
        decoded = decode(codes, scale, self.levels, geometry)
        group = self.rotation(options)
        if group is None:
            return decoded
        return rotate(decoded, group)

    def dequantize_to(
        self,
        tensors: dict[str, torch.Tensor],
        layer: LayerInput,
        options: FormatOptions,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if self.codes_per_byte > 1 or self.rotation(options) is not None:
            # more than codes x scales
            return super().dequantize_to(tensors, layer, options, dtype)
        geometry = self.geometry(options)
        scale = tensors["weight_scale"].reshape(geometry.grid_shape(layer.shape))
        return dequantize_tiles(tensors["weight"], scale, self.levels, geometry, dtype)

    def multiplies_codes(self, options: FormatOptions) -> bool:
        """Whether `product` quantizes activations too; else it decodes the weight and leaves them
        as they are.

        Not where the marker asks for full precision, the codes are packed or of a rotated weight,
        products of the codes do not exist (e5m2) or groups along K are shorter than a step of the
        tensor cores.
        """
        if options.full_precision_matrix_mult or self.rotation(options) is not None:
            return False
        if self.codes_per_byte > 1 or self.levels not in (INT8, E4M3):
            return False
        cols = self.geometry(options).cols
        return cols is None or cols >= MIN_GROUP

    def product(
        self, tensors: dict[str, torch.Tensor], layer: LayerInput, options: FormatOptions
    ) -> tuple[Op, tuple] | None:
        if not self.multiplies_codes(options):
            return None
        geometry = self.geometry(options)
        scale = tensors["weight_scale"].reshape(geometry.grid_shape(layer.shape))
        return linear_tiles, (tensors["weight"], scale, self.levels, geometry)


@dataclass(frozen=True)
class BlockOptions(FormatOptions):
    """`scaling` only repeats what the format's name says; layer-configs and old commands name
    it.
    """

    scaling: str | None = None
    block_size: int = 64

    choices: ClassVar = {"block_size": BLOCK_SIZES}


class BlockFormat(TiledFormat):
    """A tiled format with a block size, which the marker states twice (older readers know one place
    or the other).
    """

    native, min_comfyui = False, "0.8.0"
    layout_options = ("block_size",)
    # what to use where the block size does not divide, and what is stated about it
    instead: Next

    def fallback(self, layer: LayerInput, options: FormatOptions) -> Next:
        return self.instead

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        size = options.block_size
        return with_precision(
            {"format": self.name, "group_size": size, "params": {"group_size": size}}, options
        )

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> dict[str, object]:
        (_, k), scale = self.stored_matrix(specs), specs.get("weight_scale")
        if scale is None or len(scale.shape) < 2 or not scale.shape[1]:
            raise CheckpointError(
                f"weight_scale is missing or not a grid; {self.name} needs one scale per block"
            )
        return {"block_size": k // scale.shape[1]}
