"""Round-to-nearest in one pass: the bits of scale, encode and pack one after the other, on every backend."""

from pathlib import Path

import pytest
import torch

from fewbits.kernels.codebook4 import E2M1, FP4, NF4, FlatGrid, nearest_flat4
from fewbits.kernels.dispatch import use_backend
from fewbits.kernels.grids import TiledGrid, nearest_tiles
from fewbits.kernels.levels import E4M3, E5M2, INT8
from fewbits.kernels.packing import pack_nibbles
from fewbits.kernels.scales import Geometry
from support.helpers import interpreted

GEOMETRIES = {
    "tensor": Geometry(None, None), "row": Geometry(1, None), "group 16": Geometry(1, 16), "group 128": Geometry(1, 128),
    "tile 16": Geometry(16, 16), "tile 64": Geometry(64, 64), "tile 128": Geometry(128, 128),
    "tile 256": Geometry(256, 256),
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights(n: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Many magnitudes, zero blocks of both signs, numbers below every scale, subnormal ones."""
    weight = torch.randn(n, k, device=device) * torch.logspace(-8, 4, k, device=device)
    weight[: n // 8] = 0
    weight[n // 8 : n // 4, : k // 2] = -0.0
    weight[n // 4] *= 1e-30
    weight[n // 4 + 1, : k // 2] = -1e-40
    return weight.to(dtype)


def equal(got: tuple[torch.Tensor, torch.Tensor], codes: torch.Tensor, scale: torch.Tensor) -> bool:
    return torch.equal(got[0].view(torch.uint8), codes.view(torch.uint8)) and torch.equal(
        got[1], scale
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_nearest_is_encode_under_the_scale_of_the_grid(dtype):
    weight = weights(256, 256, dtype, "cpu")
    for levels in (INT8, E4M3, E5M2):
        for geometry in GEOMETRIES.values():
            grid = TiledGrid(levels, geometry)
            scale = grid.scale(weight)
            assert equal(grid.nearest(weight), grid.encode(weight, scale), scale)
            assert equal(
                grid.nearest(weight.t().contiguous().t()), grid.encode(weight, scale), scale
            )
    for levels in (NF4, FP4):
        grid = FlatGrid(levels, 64)
        scale = grid.scale(weight)
        codes = grid.encode(weight, scale)
        assert equal(grid.nearest(weight), codes, scale)
        assert equal(
            nearest_flat4(weight, levels, 64, True), pack_nibbles(codes, high_first=True), scale
        )


def test_nearest_says_why_a_kernel_does_not_run():
    weight = torch.zeros(96, 96)
    why = lambda levels, geometry: nearest_tiles.reasons(weight, levels, geometry)["triton"]  # noqa: E731
    assert why(INT8, Geometry(48, 48)) == "tiles of 48 x 48"
    assert why(E5M2, Geometry(1, None)) == "no kernel rounds to e5m2"
    assert why(INT8, Geometry(1, 32)) == "tensor is on cpu"
    assert nearest_tiles.reasons(weight.double(), INT8, Geometry(1, None)) == {
        "triton": "float64 weight"
    }
    assert nearest_flat4.reasons(weight, E2M1, 64, True) == {"triton": "no kernel rounds to e2m1"}


SCRIPT = Path(__file__).with_name("interpreted.py")


@pytest.mark.slow
def test_the_kernels_give_the_bits_of_eager_in_tritons_interpreter():
    lines = interpreted(SCRIPT)
    assert len(lines) > 400 and [line for line in lines if not line.startswith("equal ")] == []


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here():
    kernels = {line.removeprefix("compiled ") for line in interpreted(SCRIPT, "compile")}
    assert kernels >= {
        "_rows",
        "_tiles",
        "_groups",
        "_encode",
        "_pack",
        "_dequantize",
        "_patches",
        "_fit",
        "_rotate",
        "_sweep",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (768, 1280), (256, 20480)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("levels", [INT8, E4M3], ids=lambda levels: levels.name)
def test_tiles_get_the_scales_and_codes_of_eager(levels, geometry, shape, dtype):
    weight = weights(*shape, dtype, "cuda")
    with use_backend("eager"):
        codes, scale = nearest_tiles(weight, levels, geometry)
    with use_backend("triton"):
        assert equal(nearest_tiles(weight, levels, geometry), codes, scale)
        assert equal(nearest_tiles(weight.t().contiguous().t(), levels, geometry), codes, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (9, 130), (8, 4097), (5, 33333)], ids=str)
@pytest.mark.parametrize(
    "geometry", [Geometry(None, None), Geometry(1, None)], ids=["tensor", "row"]
)
@pytest.mark.parametrize("levels", [INT8, E4M3], ids=lambda levels: levels.name)
def test_odd_sizes_get_the_scales_and_codes_of_eager(levels, geometry, shape):
    weight = torch.randn(shape, device="cuda").bfloat16()
    with use_backend("eager"):
        codes, scale = nearest_tiles(weight, levels, geometry)
    with use_backend("triton"):
        assert equal(nearest_tiles(weight, levels, geometry), codes, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 2), (17, 130), (33, 4100), (768, 1280)], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, 4096])
@pytest.mark.parametrize("levels", [NF4, FP4], ids=lambda levels: levels.name)
def test_four_bit_weights_get_the_bytes_of_eager(levels, group, shape, dtype):
    weight = weights(*shape, dtype, "cuda")
    for packed in (False, True):
        with use_backend("eager"):
            codes, scale = nearest_flat4(weight, levels, group, packed)
        with use_backend("triton"):
            assert equal(nearest_flat4(weight, levels, group, packed), codes, scale)


@pytest.mark.gpu
def test_a_region_with_nan_has_a_nan_scale_and_spoils_no_other():
    weight = torch.randn(128, 256, device="cuda")
    spoilt = weight.clone()
    spoilt[3, 200] = float("nan")
    for geometry in (Geometry(None, None), Geometry(1, None), Geometry(1, 64), Geometry(64, 64)):
        with use_backend("triton"):
            (codes, scale), (expected, whole) = (
                nearest_tiles(w, INT8, geometry) for w in (spoilt, weight)
            )
        nan = scale.isnan()
        assert nan.sum() == 1 and torch.equal(scale[~nan], whole[~nan])
        rows, cols = 128 // scale.shape[0], 256 // scale.shape[1]
        kept = ~nan.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        assert torch.equal(codes[kept], expected[kept])
