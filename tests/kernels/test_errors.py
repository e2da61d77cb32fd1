"""Squared errors of codes: what every backend measures is what float64 finds in the decoded weight."""

import pytest
import torch

from fewbits.kernels.codebook4 import E2M1, FP4, NF4, FlatGrid
from fewbits.kernels.dispatch import use_backend
from fewbits.kernels.grids import TiledGrid, deviation, tile_errors
from fewbits.kernels.levels import E4M3, E5M2, INT4, INT8
from fewbits.kernels.mxfp8 import Mxfp8Grid
from fewbits.kernels.nvfp4 import Nvfp4Grid
from fewbits.kernels.scales import Geometry
from fewbits.kernels.w4a8 import W4A8Grid

SHAPE = (96, 1152)
GEOMETRIES = {"tensor": Geometry(None, None), "row": Geometry(1, None), "group": Geometry(1, 128),
              "tile": Geometry(32, 32), "uneven": Geometry(48, 144)}  # fmt: skip
GRIDS = {
    f"{levels.name} {name}": TiledGrid(levels, geometry)
    for levels in (INT8, INT4, E4M3, E5M2, NF4, FP4, E2M1)
    for name, geometry in GEOMETRIES.items()
}
GRIDS |= {
    f"{levels.name} {group}": FlatGrid(levels, group)
    for levels in (NF4, FP4)
    for group in (32, 64, 4096)
}
GRIDS |= {"mxfp8": Mxfp8Grid(), "nvfp4": Nvfp4Grid(), "w4a8": W4A8Grid()}
# Relative errors met in 5 x 3 weights: sums of everything 1.2e-5 (eager on a CPU; the kernels 3e-8), of regions 4e-7.
WHOLE, REGION = 5e-5, 2e-6


def check(grid, weight: torch.Tensor) -> None:
    scale = grid.scale(weight)
    codes = grid.encode(weight, scale)
    decoded, wide = grid.decode(codes, scale).double(), weight.float().double()
    exact = (decoded - wide).square()
    error, signal, product, largest = grid.deviation(weight, codes, scale)
    assert (error, signal) == pytest.approx(
        (float(exact.sum()), float(wide.square().sum())), rel=WHOLE
    )
    # a sum of terms of either sign: its rounding is that of its terms
    terms = (decoded - wide) * wide
    assert product == pytest.approx(float(terms.sum()), abs=WHOLE * float(terms.abs().sum()))
    assert largest == pytest.approx(float((decoded - wide).abs().max()), rel=1e-6)
    errors = grid.region_errors(weight, codes, scale)
    assert errors.dtype == torch.float32
    if isinstance(grid, FlatGrid):
        runs = exact.view(-1).split(grid.group_size)
        expected = torch.stack([run.sum() for run in runs])
    else:
        rows, cols = errors.shape
        expected = exact.view(rows, len(exact) // rows, cols, -1).sum((1, 3))
    torch.testing.assert_close(errors.double(), expected, rtol=REGION, atol=1e-12)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_errors_are_those_of_the_decoded_weight(grid, dtype):
    check(grid, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_kernels_measure_them_too(grid, dtype):
    weight = torch.randn(SHAPE, device="cuda").to(dtype)
    weight[:32] = 0
    check(grid, weight)
    check(grid, weight.t().contiguous().t())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (257, 2), (2, 5000)], ids=str)
def test_odd_shapes_and_nan(shape):
    weight, geometry = torch.randn(shape, device="cuda").bfloat16(), Geometry(1, None)
    grid = TiledGrid(INT8, geometry)
    check(grid, weight)
    scale = grid.scale(weight)
    codes = grid.encode(weight, scale)
    scale[0] = float("nan")
    with use_backend("triton"):
        found = tile_errors(weight, codes, scale, INT8, geometry)
        assert (
            found.isnan().nonzero().tolist() == [[0, 0]]
            and deviation(weight, codes, scale, INT8, geometry)[1] > 0
        )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_ends_are_the_codes_that_a_far_too_small_scale_gives(grid):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    small = grid.encode(weight * 1e6, grid.scale(weight))
    found = set(small.view(torch.uint8).unique().tolist())
    assert len(grid.ends) == 2 and set(grid.ends) <= found


def test_errors_say_why_a_kernel_does_not_run():
    weight, codes = torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int8)
    assert tile_errors.reasons(weight, codes, torch.ones(1, 1), INT8, Geometry(None, None)) == {
        "triton": "tensor is on cpu"
    }
