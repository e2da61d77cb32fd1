"""One call that runs a method on a format's grid as the pipeline does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from fewbits.kernels.grids import Grid
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.methods import Choice, Inputs, Layer, choose, get_method, layer_generator
from fewbits.quant_ops.planning.wish import parse_wish
from fewbits.quant_ops.sources import DTYPE_NAMES
from fewbits.quant_ops.spec import LayerInput
from support.layers import correlated_rows

FORMATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "int8_tensorwise",
    "int8_tensorwise:scaling=tensor",
    "int8_tensorwise:convrot=true,convrot_groupsize=64",
    "int8_blockwise:block_size=64",
    "int8_lodewise:block_size=64",
    "mxfp8",
    "nvfp4",
    "bnb_nf4",
    "bnb_fp4",
    "convrot_w4a4:convrot_groupsize=64",
    "asym_w4a8_int8:convrot_groupsize=64",
)


@dataclass(frozen=True)
class Run:
    """One layer quantized by a method: what was chosen, and decoded matrices of it and of nearest."""

    weight: torch.Tensor  # prepared: rotated or padded
    grid: Grid
    choice: Choice
    steps: int

    @property
    def error(self) -> torch.Tensor:
        return self.grid.decode(self.choice.codes, self.choice.scale) - self.weight

    @property
    def error_nearest(self) -> torch.Tensor:
        return self.grid.decode(*self.grid.nearest(self.weight)) - self.weight

    @property
    def objective_ratio(self) -> float:
        return self.choice.objective / self.choice.objective_nearest

    @property
    def weight_ratio(self) -> float:
        return float(self.error.norm() / self.error_nearest.norm())

    def tensors(self) -> list[torch.Tensor]:
        """Codes and scales as bytes."""
        scale = self.choice.scale
        parts = [scale] if isinstance(scale, torch.Tensor) else list(scale)
        return [
            part.contiguous().view(-1).view(torch.uint8) for part in (self.choice.codes, *parts)
        ]


def run(
    weight: torch.Tensor,
    text: str,
    method: str,
    *,
    seed: int = 0,
    name: str = "layer",
    step: Callable[[], None] = lambda: None,
    inputs: Inputs | None = None,
    **options: object,
) -> Run:
    """Quantize one weight; `text` is a format with its options as --rule has it."""
    wish = parse_wish(text)
    format, chosen = get_format(wish.format), get_method(method)
    layer = LayerInput(tuple(weight.shape), DTYPE_NAMES[weight.dtype])
    assert format.check(layer, wish.options) is None
    prepared, grid = format.prepare(weight, wish.options), format.grid(layer, wish.options)
    generator = layer_generator(seed, name, weight.device)
    steps = []

    def counted() -> None:
        steps.append(1)
        step()

    if chosen.needs_inputs:
        inputs = (inputs or seen_by(weight.shape[1])).map(lambda x: format.prepare(x, wish.options))
    settings = chosen.configure(options)
    choice = choose(chosen, Layer(prepared, grid, settings, generator, counted, inputs))
    return Run(prepared.float(), grid, choice, len(steps))


@cache
def seen_by(columns: int, rows: int = 512) -> Inputs:
    """Two halves of correlated activations, as a calibration gives them."""
    x = correlated_rows(columns, rows) / (rows // 2) ** 0.5
    return Inputs((x[: rows // 2], x[rows // 2 :]), (rows // 2, rows // 2))


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
