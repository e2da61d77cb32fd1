"""Triton kernels on a real GPU: equal to eager where results are stored or decoded, at most twice its error in matmuls."""

import pytest
import torch

from fewbits.kernels import runtime
from fewbits.kernels.codebook4 import FP4, NF4, FlatGrid
from fewbits.kernels.dispatch import list_backends, use_backend
from fewbits.kernels.grids import E4M3, E5M2, INT8, TiledGrid
from fewbits.kernels.packing import pack_nibbles
from fewbits.kernels.scales import Geometry

TILED = {
    "fp8 tensor": (E4M3, Geometry(None, None)), "e5m2 tensor": (E5M2, Geometry(None, None)),
    "fp8 row": (E4M3, Geometry(1, None)), "fp8 block": (E4M3, Geometry(64, 64)), "fp8 group": (E4M3, Geometry(1, 64)),
    "int8 row": (INT8, Geometry(1, None)), "int8 block": (INT8, Geometry(128, 128)), "int8 group": (INT8, Geometry(1, 128)),
}  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_ops_list_their_backends_and_say_why_one_does_not_run():
    assert list_backends()["linear_flat4"] == ["triton", "eager"]
    packed = torch.zeros(4, 32, dtype=torch.uint8)
    reasons = runtime.dequantize_flat4.reasons(packed, torch.ones(4), NF4, 64, torch.float32)
    assert reasons == {"triton": "tensor is on cpu"}
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend triton cannot run: tensor is on cpu"):
        runtime.dequantize_flat4(packed, torch.ones(4), NF4, 64, torch.float32)
    with use_backend("eager"):
        assert runtime.dequantize_flat4(packed, torch.ones(4), NF4, 64, torch.float32).shape == (4, 64)


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
    codes = torch.tensor([[0x7F, 0xFF, 0x38, 0x00]], dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    with use_backend("triton"):
        out = runtime.dequantize_tiles(codes, torch.ones(1, 1, device="cuda"), E4M3, Geometry(1, None), torch.float32)
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 16])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(64, 64, 64), (1, 64, 64), (257, 192, 64), (3072, 1152, 128), (768, 12288, 64), (65, 96, 32)]
)
@pytest.mark.parametrize("levels", [NF4, FP4], ids=lambda levels: levels.name)
def test_a_fused_linear_errs_at_most_twice_as_much_as_eager(levels, n, k, group, m, dtype):
    packed, absmax = four_bit(n, k, levels, group)
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    with use_backend("eager"):
        weight = runtime.dequantize_flat4(packed, absmax, levels, group, torch.float32).double()
        eager = runtime.linear_flat4(x, packed, absmax, levels, group, bias)
    truth = x.double() @ weight.t() + bias.double()
    with use_backend("triton"):
        for b, expected in ((bias, truth), (None, truth - bias.double())):
            got = runtime.linear_flat4(x, packed, absmax, levels, group, b)
            allowed = 2 * (eager.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
            assert (got.double() - expected).abs().max() <= allowed
            assert torch.equal(got, runtime.linear_flat4(x, packed, absmax, levels, group, b))  # no atomics


@pytest.mark.gpu
def test_nan_in_the_input_stays_nan():
    packed, absmax = four_bit(64, 128, NF4, 64)
    x = torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    with use_backend("triton"):
        out = runtime.linear_flat4(x, packed, absmax, NF4, 64, None)
    assert out[1].isnan().all() and not out[0].isnan().any() and not out[2].isnan().any()
