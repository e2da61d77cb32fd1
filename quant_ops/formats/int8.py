"""INT8: q = round(w / scale) in [-127, 127] with one scale per tensor, row, tile or group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ...kernels.levels import INT8
from ..errors import CheckpointError, RecipeError
from ..spec import LayerInput, TensorSpec
from .arrangement import Arrangement
from .base import FormatOptions, register_format, stated_in, with_precision
from .chain import INT8_ROW, Next
from .convrot import AUTO, LARGEST, READ, WRITTEN, refusal, smaller_group, stored_group
from .tiled import BLOCK_SIZES, BlockFormat, BlockOptions, TiledFormat


class Int8Tensorwise(TiledFormat):
    """Row scales by default. A tensor scale is 0-d, rows are (N, 1): comfy-kitchen requantizes by
    the scale's rank.

    With `convrot` the codes are those of the rotated weight (kernels/hadamard.py); it needs row
    scales. `auto`, which the short name means, rotates every layer with row scales whose K a group
    divides, but for embedding tables: their rows are looked up, not multiplied. The emoji model
    gains .003 of SSIM by it (docs/quality.md).

    Example with convrot=false:

        127 -2 0.3 0
        1 0.001 -100 63.5

    is stored as

        weight I8 (2, 4): 7f fe 00 00 01 00 81 51
        weight_scale F32 (2, 1): 00 00 80 3f 26 93 49 3f
        comfy_quant: {"format": "int8_tensorwise", "per_row": true}

    Example with scaling=tensor:

        127 -2 0.3 0
        1 0.001 -100 63.5

    is stored as

        weight I8 (2, 4): 7f fe 00 00 01 00 9c 40
        weight_scale F32 (): 00 00 80 3f
        comfy_quant: {"format": "int8_tensorwise"}

    Example with convrot=true, convrot_groupsize=16:

        4 0 x15

    is stored as

        weight I8 (1, 16): 7f 7f 7f 81 7f 7f 7f 81 7f 7f 7f 81 x4 7f
        weight_scale F32 (1, 1): 04 02 01 3c
        comfy_quant: {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 16,
            "per_row": true}
    """

    name, min_comfyui, native = "int8_tensorwise", "0.27.0", True
    short, short_options = "int8", {"convrot": AUTO}
    embedding_min_comfyui = "0.29.0"
    levels = INT8
    arrangements = (Arrangement.TENSOR, Arrangement.ROW)
    layout_options = ("scaling", "convrot_groupsize")

    @dataclass(frozen=True)
    class Options(FormatOptions):
        scaling: str = "row"
        convrot: bool | str = False
        convrot_groupsize: int | None = None

        choices: ClassVar = {
            "scaling": ("row", "tensor"),
            "convrot": (False, True, AUTO),
            "convrot_groupsize": WRITTEN,
        }
        stored: ClassVar = {"convrot_groupsize": READ}

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.convrot_groupsize and not self.convrot:
                raise RecipeError("convrot_groupsize needs convrot = true")
            if self.convrot is True and self.scaling != "row":
                raise RecipeError(f"convrot needs scaling row; got {self.scaling}")

    def configure(self, stated: Mapping[str, object]) -> FormatOptions:
        if stated.get("convrot") is True and stated.get("convrot_groupsize") is None:
            stated = {**stated, "convrot_groupsize": LARGEST}
        return super().configure(stated)

    def settled(
        self, layer: LayerInput, options: FormatOptions, *, looked_up: bool = False
    ) -> FormatOptions:
        if options.convrot != AUTO:
            return options
        rotated = options.scaling == "row" and not looked_up
        if not rotated:
            return replace(options, convrot=False, convrot_groupsize=None)
        group = options.convrot_groupsize or LARGEST
        return replace(options, convrot=True, convrot_groupsize=group)

    def same_codes(self, options: FormatOptions, other: FormatOptions) -> bool:
        if AUTO in (options.convrot, other.convrot):
            return options.scaling == other.scaling
        return super().same_codes(options, other)

    def rotation(self, options: FormatOptions) -> int | None:
        return options.convrot_groupsize

    def steps(self, options: FormatOptions) -> tuple[int, int]:
        return 1, self.rotation(options) or 1

    def check(self, layer: LayerInput, options: FormatOptions) -> str | None:
        group = self.rotation(options)
        if group is None:
            return None
        return refusal(layer, group)

    def fallback(self, layer: LayerInput, options: FormatOptions) -> Next:
        smaller = smaller_group(layer, options.convrot_groupsize)
        rotated = {"convrot": smaller is not None, "convrot_groupsize": smaller}
        return self.name, {**options.as_dict(), **rotated}

    def scale_shape(self, shape: tuple[int, int], options: FormatOptions) -> tuple[int, ...]:
        if options.scaling == "row":
            return (shape[0], 1)
        return ()

    def marker(self, layer: LayerInput, options: FormatOptions) -> dict:
        marker = {"format": self.name}
        if options.convrot:
            marker |= {"convrot": True, "convrot_groupsize": options.convrot_groupsize}
        if options.scaling == "row":
            marker["per_row"] = True
        return with_precision(marker, options)

    def stored_options(self, marker: dict, specs: dict[str, TensorSpec]) -> dict[str, object]:
        scale = specs.get("weight_scale")
        row = scale is not None and len(scale.shape) > 0
        options = {"scaling": "row" if row else "tensor"}
        if not stated_in(marker, "convrot", False):
            return options
        if not row:
            raise CheckpointError(
                "weight_scale is a single number; a rotated layer (convrot) needs one scale per row"
            )
        group = stored_group(marker, self.stored_layer(marker, specs))
        return {**options, "convrot": True, "convrot_groupsize": group}


@dataclass(frozen=True)
class Int8BlockOptions(BlockOptions):
    block_size: int = 128


class Int8Blockwise(BlockFormat):
    """One scale per square tile; N and K are multiples of its side.

    Example with block_size=16:

        127 -2 0.3 0 x13 1 0 x15
        15 rows of 0 x32

    is stored as

        weight I8 (16, 32): 7f fe 00 x14 7f 00 x495
        weight_scale F32 (1, 2): 00 00 80 3f 04 02 01 3c
        comfy_quant: {"format": "int8_blockwise", "group_size": 16, "params": {"group_size":
            16}}
    """

    name, instead = "int8_blockwise", INT8_ROW
    levels = INT8
    arrangements = (Arrangement.TILE,)

    @dataclass(frozen=True)
    class Options(Int8BlockOptions):
        choices: ClassVar = {"scaling": ("block2d", "block"), "block_size": BLOCK_SIZES}


class Int8Lodewise(BlockFormat):
    """One scale per block of a row; K is a multiple of the block.

    Example with block_size=16:

        127 -2 0.3 0 x13 1 -0.5 0 x14

    is stored as

        weight I8 (1, 32): 7f fe 00 x14 7f c0 00 x14
        weight_scale F32 (1, 2): 00 00 80 3f 04 02 01 3c
        comfy_quant: {"format": "int8_lodewise", "group_size": 16, "params": {"group_size":
            16}}
    """

    name, instead = "int8_lodewise", INT8_ROW
    levels = INT8
    arrangements = (Arrangement.GROUP,)
    modes_meant = ("block3d",)

    @dataclass(frozen=True)
    class Options(Int8BlockOptions):
        choices: ClassVar = {"scaling": ("block",), "block_size": BLOCK_SIZES}


register_format(Int8Tensorwise())
register_format(Int8Blockwise())
register_format(Int8Lodewise())
