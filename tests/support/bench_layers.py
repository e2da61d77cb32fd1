"""For benchmarks on a GPU: captured graphs over rotated inputs, and plain calls; the shapes and layers that the tables use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewbits.kernels import runtime
from fewbits.kernels.codebook4 import FP4, NF4, FlatGrid
from fewbits.kernels.grids import TiledGrid
from fewbits.kernels.levels import E4M3, INT8
from fewbits.kernels.packing import pack_nibbles
from fewbits.kernels.scales import Geometry
from fewbits.quant_ops.bench import median_ms, replayed

from .helpers import flux_shapes

SHAPES = ((12288, 3072), (3072, 12288), (3072, 15360), (3072, 3072), (1280, 1280), (5120, 13824))
ROWS = (1, 16, 64, 256, 1024, 4608)
CACHE = 60e6  # bytes of L2 on an H200: timed weights must exceed it together

TILED = {
    "int8 row": (INT8, Geometry(1, None)),
    "int8 block 128": (INT8, Geometry(128, 128)),
    "int8 block 64": (INT8, Geometry(64, 64)),
    "int8 group 128": (INT8, Geometry(1, 128)),
    "fp8 row": (E4M3, Geometry(1, None)),
    "fp8 block 128": (E4M3, Geometry(128, 128)),
    "fp8 block 64": (E4M3, Geometry(64, 64)),
}
FLAT = {"nf4 64": (NF4, 64), "fp4 64": (FP4, 64)}


def end_without_gpu() -> None:
    """End the script, in good order, where there is nothing to measure on."""
    if not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).stem}: needs an NVIDIA GPU; nothing was measured")
        sys.exit(0)


def graph_time(calls: list[Callable], repeats: int = 7) -> float:
    """Median milliseconds of one call in a captured graph; the list holds the same call on different inputs."""
    return median_ms(calls, torch.device("cuda"), repeats)


def eager_time(calls: list[Callable], repeats: int = 7) -> float:
    """Median milliseconds of one plain call, launches included."""

    def run() -> None:
        for call in calls:
            call()

    run()
    torch.cuda.synchronize()
    return replayed(run, repeats) / len(calls)


@dataclass
class Layer:
    """Copies of one weight, bf16 and as codes with scales, enough of them to exceed the cache."""

    plain: list[torch.Tensor]
    codes: list[torch.Tensor]
    scales: list[torch.Tensor]

    def linears(
        self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> list[Callable]:
        """The product as the pack runs it, once per copy."""
        if name in FLAT:
            levels, group = FLAT[name]
            return [
                lambda c=c, s=s: runtime.linear_flat4(x, c, s, levels, group, bias)
                for c, s in zip(self.codes, self.scales)
            ]
        levels, geometry = TILED[name]
        return [
            lambda c=c, s=s: runtime.linear_tiles(x, c, s, levels, geometry, bias)
            for c, s in zip(self.codes, self.scales)
        ]

    def fallbacks(self, name: str, x: torch.Tensor) -> list[Callable]:
        """Dequantize and the library's bf16 product."""
        return [
            lambda d=d: torch.nn.functional.linear(x, d()) for d in self.dequantizes(name, x.dtype)
        ]

    def dequantizes(self, name: str, dtype: torch.dtype) -> list[Callable]:
        if name in FLAT:
            levels, group = FLAT[name]
            return [
                lambda c=c, s=s: runtime.dequantize_flat4(c, s, levels, group, dtype)
                for c, s in zip(self.codes, self.scales)
            ]
        levels, geometry = TILED[name]
        return [
            lambda c=c, s=s: runtime.dequantize_tiles(c, s, levels, geometry, dtype)
            for c, s in zip(self.codes, self.scales)
        ]

    def plain_linears(self, x: torch.Tensor) -> list[Callable]:
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in self.plain]


def layer(name: str, n: int, k: int, device: str = "cuda") -> Layer:
    """A random weight in the named kind of codes."""
    weight = torch.randn(n, k, device=device) / k**0.5
    if name in FLAT:
        levels, group = FLAT[name]
        grid = FlatGrid(levels, group)
        scale = grid.scale(weight)
        codes = pack_nibbles(grid.encode(weight, scale), high_first=True)
    else:
        grid = TiledGrid(*TILED[name])
        scale = grid.scale(weight)
        codes = grid.encode(weight, scale)
    copies = max(2, min(16, int(2.5 * CACHE // codes.nbytes)))
    plain = [
        weight.bfloat16()
        for _ in range(max(2, min(copies, int(2.5 * CACHE // (2 * weight.numel())))))
    ]
    return Layer(
        plain, [codes.clone() for _ in range(copies)], [scale.clone() for _ in range(copies)]
    )


TEXT = 4096  # width of a prompt


def write_flux(
    path: Path, blocks: tuple[int, int], hidden: int, device: torch.device | str
) -> None:
    """A file of so many double and single Flux blocks: random bf16 weights, about as large as trained ones."""
    shapes = {**flux_shapes(hidden, *blocks), "txt_in.weight": (hidden, TEXT)}
    generator = torch.Generator(device).manual_seed(hidden)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            value = torch.randn(shape, device=device, generator=generator) / shape[1] ** 0.5
        else:
            value = torch.full(shape, float("norm" in name), device=device)
        tensors[name] = value.bfloat16().cpu()
    save_file(tensors, path)
