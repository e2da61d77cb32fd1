"""Kernels whose results are stored or decoded: on a GPU they equal eager bit for bit."""

import pytest
import torch

from fewbits.kernels import runtime
from fewbits.kernels.activations import quantize_activations
from fewbits.kernels.codebook4 import FP4, NF4, FlatGrid
from fewbits.kernels.dispatch import list_backends, use_backend
from fewbits.kernels.grids import TiledGrid, encode
from fewbits.kernels.levels import E4M3, E5M2, INT8
from fewbits.kernels.packing import pack_nibbles
from fewbits.kernels.scales import Geometry

TILED = {
    "fp8 tensor": (E4M3, Geometry(None, None)), "e5m2 tensor": (E5M2, Geometry(None, None)),
    "fp8 row": (E4M3, Geometry(1, None)), "fp8 block": (E4M3, Geometry(64, 64)), "fp8 group": (E4M3, Geometry(1, 64)),
    "int8 row": (INT8, Geometry(1, None)), "int8 block": (INT8, Geometry(128, 128)), "int8 group": (INT8, Geometry(1, 128)),
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_ops_list_their_backends_and_say_why_one_does_not_run():
    assert list_backends()["linear_flat4"] == ["hopper", "cuda", "scratch", "dequantize", "eager"]
    packed = torch.zeros(4, 32, dtype=torch.uint8)
    reasons = runtime.dequantize_flat4.reasons(packed, torch.ones(4), NF4, 64, torch.float32)
    assert reasons == {"triton": "tensor is on cpu"}
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="backend triton cannot run: tensor is on cpu"),
    ):
        runtime.dequantize_flat4(packed, torch.ones(4), NF4, 64, torch.float32)
    with use_backend("eager"):
        assert runtime.dequantize_flat4(packed, torch.ones(4), NF4, 64, torch.float32).shape == (
            4,
            64,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1152, 640)], ids=str)
@pytest.mark.parametrize(("levels", "geometry"), TILED.values(), ids=TILED)
def test_tiles_dequantize_equal_to_eager(levels, geometry, shape, dtype):
    weight = torch.randn(shape, device="cuda") * torch.logspace(-8, 4, shape[1], device="cuda")
    weight[:64, :64] = 0
    grid = TiledGrid(levels, geometry)
    scale = grid.scale(weight)
    codes = grid.encode(weight, scale)
    with use_backend("triton"):
        got = runtime.dequantize_tiles(codes, scale, levels, geometry, dtype)
    with use_backend("eager"):
        assert torch.equal(got, runtime.dequantize_tiles(codes, scale, levels, geometry, dtype))


@pytest.mark.gpu
def test_nan_codes_stay_nan():
    codes = torch.tensor([[0x7F, 0xFF, 0x38, 0x00]], dtype=torch.uint8, device="cuda").view(
        torch.float8_e4m3fn
    )
    with use_backend("triton"):
        out = runtime.dequantize_tiles(
            codes, torch.ones(1, 1, device="cuda"), E4M3, Geometry(1, None), torch.float32
        )
    assert out.isnan().tolist() == [[True, True, False, False]]


def four_bit(n, k, levels, group):
    weight = torch.randn(n, k, device="cuda") / k**0.5
    grid = FlatGrid(levels, group)
    absmax = grid.scale(weight)
    return pack_nibbles(grid.encode(weight, absmax), high_first=True), absmax


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "group"), [(64, 64, 64), (17, 130, 64), (1, 2, 64), (3072, 3072, 128), (129, 96, 32)]
)
@pytest.mark.parametrize("levels", [NF4, FP4], ids=lambda levels: levels.name)
def test_four_bit_codes_dequantize_equal_to_eager(levels, n, k, group, dtype):
    packed, absmax = four_bit(n, k, levels, group)
    arguments = (packed, absmax, levels, group, dtype)
    with use_backend("triton"):
        got = runtime.dequantize_flat4(*arguments)
    with use_backend("eager"):
        assert torch.equal(got, runtime.dequantize_flat4(*arguments))


WEIGHTS = {
    name: case for name, case in TILED.items() if case[0] is not E5M2
}  # no kernel rounds to e5m2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1152, 640), (128, 20480)], ids=str)
@pytest.mark.parametrize(("levels", "geometry"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_get_the_scales_and_codes_of_eager(levels, geometry, shape, dtype):
    weight = torch.randn(shape, device="cuda") * torch.logspace(-8, 4, shape[1], device="cuda")
    weight[:64, :64] = 0
    weight[64:128, :64] = -0.0
    weight = weight.to(dtype)
    grid = TiledGrid(levels, geometry)
    with use_backend("eager"):
        scale = grid.scale(weight)
        codes = grid.encode(weight, scale)
    for w in (weight, weight.t().contiguous().t()):
        assert torch.equal(grid.scale(w), scale)
        assert torch.equal(grid.encode(w, scale).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2), (17, 130), (256, 384), (33, 4100)], ids=str)
@pytest.mark.parametrize("group", [32, 64, 4096])
@pytest.mark.parametrize("levels", [NF4, FP4], ids=lambda levels: levels.name)
def test_four_bit_weights_get_the_bytes_of_eager(levels, group, shape):
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    weight[0] = 0
    grid = FlatGrid(levels, group)
    absmax = grid.scale(weight)
    packed = pack_nibbles(grid.encode(weight, absmax), high_first=True)
    with use_backend("eager"):
        assert torch.equal(absmax, grid.scale(weight))
        assert torch.equal(packed, pack_nibbles(grid.encode(weight, absmax), high_first=True))


@pytest.mark.gpu
def test_every_float_rounds_to_the_code_that_eager_gives():
    """All 65536 bfloat16 weights but NaN and infinities, under one scale."""
    bits = (
        torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16)
    )
    weight = bits[bits.isfinite()].view(-1, 64)
    for levels in (INT8, E4M3, NF4, FP4):
        for scale in (1.0, 3e-3, 1e30):
            grid = torch.full((1, 1), scale, device="cuda")
            got = encode(weight, grid, levels, Geometry(None, None))
            with use_backend("eager"):
                expected = encode(weight, grid, levels, Geometry(None, None))
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (
                levels.name,
                scale,
            )


@pytest.mark.gpu
def test_a_tile_with_nan_has_a_nan_scale():
    weight = torch.randn(128, 256, device="cuda")
    weight[3, 200] = float("nan")
    for geometry in (Geometry(None, None), Geometry(1, None), Geometry(1, 64), Geometry(64, 64)):
        with use_backend("eager"):
            expected = geometry.absmax(weight)
        assert torch.equal(geometry.absmax(weight).nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 192), (17, 1088), (257, 3072), (2, 40960)], ids=str)
@pytest.mark.parametrize("group", [None, 64], ids=["row", "group"])
@pytest.mark.parametrize("levels", [INT8, E4M3], ids=lambda levels: levels.name)
def test_activations_get_the_codes_of_eager(levels, group, shape, dtype):
    x = torch.randn(shape, device="cuda") * torch.logspace(-6, 3, shape[1], device="cuda")
    x[:, :64] = 0
    x[-1] *= 0
    wide = torch.zeros(shape[0], shape[1] + 8, device="cuda", dtype=dtype)
    wide[:, : shape[1]] = x
    for tokens in (x.to(dtype), wide[:, : shape[1]]):
        with use_backend("triton"):
            codes, scale = quantize_activations(tokens, levels, group)
        with use_backend("eager"):
            expected, expected_scale = quantize_activations(tokens, levels, group)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8)) and torch.equal(
            scale, expected_scale
        )


@pytest.mark.gpu
@pytest.mark.parametrize("group", [None, 64], ids=["row", "group"])
@pytest.mark.parametrize("levels", [INT8, E4M3], ids=lambda levels: levels.name)
def test_activations_that_are_not_finite_show_in_the_scale(levels, group):
    x = torch.randn(4, 128, device="cuda", dtype=torch.bfloat16)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    with use_backend("triton"):
        _, scale = quantize_activations(x, levels, group)
    assert scale[1, 0].isnan() and scale[2, 0].isinf() and scale[[0, 3]].isfinite().all()
