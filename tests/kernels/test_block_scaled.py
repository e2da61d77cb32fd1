"""MXFP8, NVFP4 and W4A8 grids: exponents from bits, two-level scales, zero blocks, seeds, decoding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.kernels.dispatch import use_backend
from fewbits.kernels.hadamard import rotate
from fewbits.kernels.mxfp8 import Mxfp8Grid, e8m0_ceiling, e8m0_value
from fewbits.kernels.nvfp4 import Nvfp4Grid
from fewbits.kernels.w4a8 import (
    GROUP,
    LEVELS,
    SPANS,
    W4A8Grid,
    dequantize_w4a8,
    fit_groups,
    level_thresholds,
    nearest_w4a8,
    round_level,
)
from support.vectors import raw

INFINITY = torch.tensor(float("inf"))


def up(value: float) -> float:
    return float(torch.nextafter(torch.tensor(value), INFINITY))


@pytest.mark.parametrize(
    ("absmax", "exponent"),
    [
        (448, 127),
        (up(448), 128),
        (up(224), 127),
        (0.4375, 117),
        (up(0.4375), 118),
        (3.5, 120),
        (up(3.5), 121),
    ],
    ids=[
        "448",
        "next above 448",
        "next above 224",
        ".4375",
        "next above .4375",
        "3.5",
        "next above 3.5",
    ],
)
def test_exponent_bytes_are_the_golden_ones(absmax, exponent):
    block = torch.zeros(1, 32)
    block[0, 7] = -absmax
    assert Mxfp8Grid().scale(block).tolist() == [[exponent]]


@settings(max_examples=200, deadline=None)
@given(value=st.floats(2.0**-120, 2.0**120, width=32))
def test_the_exponent_is_that_of_the_smallest_power_of_two_not_below(value):
    mantissa, exponent = math.frexp(value)
    expected = exponent - 1 if mantissa == 0.5 else exponent
    byte = e8m0_ceiling(torch.tensor([value]))
    assert byte.tolist() == [expected + 127]
    assert e8m0_value(byte).item() == 2.0**expected


def test_a_zero_block_of_mxfp8_has_byte_zero_and_decodes_to_zero():
    weight = torch.zeros(2, 64)
    weight[0, :32] = -(2.0**-90)
    weight[1, 32:] = 3.0
    grid = Mxfp8Grid()
    scale = grid.scale(weight)
    assert scale[0].tolist() == [0, 0] and scale[1, 0] == 0 and scale[1, 1] != 0
    codes = grid.encode(weight, scale)
    assert not any(raw(codes[0])) and not any(raw(codes[1, :32]))
    assert torch.equal(grid.decode(codes, scale)[1, 32:], weight[1, 32:])


def test_blocks_of_nvfp4_whose_scale_rounds_to_zero_have_only_zero_codes():
    weight = torch.ones(1, 32)
    weight[0, :16] = -(2.0**-30)  # b = 2^-30 / 6 / ts underflows e4m3fn
    grid = Nvfp4Grid()
    scale = grid.scale(weight)
    assert scale.block.float()[0, 0] == 0
    codes = grid.encode(weight, scale)
    assert not codes[0, :16].any()
    assert not grid.decode(codes, scale)[0, :16].any()


def test_tiny_applies_to_the_nvfp4_tensor():
    grid = Nvfp4Grid()
    weight = torch.full((1, 16), -(2.0**-81))
    scale = grid.scale(weight)
    assert scale.per_tensor.item() == 1.0
    assert not any(raw(scale.block)) and not grid.encode(weight, scale).any()
    assert grid.scale(weight * 4).per_tensor.item() < 1.0


def test_zero_groups_and_zero_rows_of_w4a8_decode_to_exact_zeros():
    weight = torch.zeros(3, 2 * GROUP)
    weight[1, GROUP:] = torch.randn(GROUP, generator=torch.Generator().manual_seed(0))
    weight[2, :GROUP] = 2.0**-81
    grid = W4A8Grid()
    scale = grid.scale(weight)
    assert scale.channel[0] == 1.0 and scale.channel[2] == 1.0 and 0 < scale.channel[1] < 0.1
    assert scale.relative.float()[[0, 0, 1, 2, 2], [0, 1, 0, 0, 1]].tolist() == [0] * 5
    codes = grid.encode(weight, scale)
    assert not codes[0].any() and not codes[1, :GROUP].any() and not codes[2].any()
    decoded = grid.decode(codes, scale)
    assert not decoded[0].any() and not decoded[1, :GROUP].any() and not decoded[2].any()
    assert (decoded[1, GROUP:] - weight[1, GROUP:]).norm() < 0.15 * weight[1, GROUP:].norm()


def stored_w4a8(n: int, k: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Every group scale but NaN, and codes of both signs."""
    packed = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
    relative = (torch.arange(n * k // GROUP) % 127).byte().view(torch.float8_e4m3fn).view(n, -1)
    return tuple(
        tensor.to(device)
        for tensor in (packed, relative, torch.rand(n) + 1e-6, torch.tensor(LEVELS))
    )


@pytest.mark.parametrize("span", [4, 16, 64, 256, 1024])
def test_w4a8_is_decoded_with_the_rounding_of_its_two_factors_alone(span):
    packed, relative, channel, levels = stored_w4a8(7, 2048)
    codes = torch.stack([packed & 15, packed >> 4 & 15], 2).view(7, -1).long()
    q8 = (
        (levels[codes].view(7, -1, GROUP) * relative.float()[..., None])
        .round()
        .clamp(-127, 127)
        .view(7, -1)
        .double()
    )
    exact = (q8.view(7, -1, span) @ rotate(torch.eye(span), span).double()).view(7, -1)
    got = dequantize_w4a8(packed, relative, channel, levels, span, torch.float32)
    assert torch.equal(got, exact.float() * channel[:, None])
    half = dequantize_w4a8(packed, relative, channel, levels, span, torch.bfloat16)
    assert torch.equal(half, got.bfloat16())


def test_nan_in_a_scale_of_w4a8_stays_in_its_span_and_row():
    packed, relative, channel, levels = stored_w4a8(5, 256)
    relative.view(torch.uint8)[1, 5] = 0x7F
    channel[3] = float("nan")
    nan = dequantize_w4a8(packed, relative, channel, levels, 64, torch.float32).isnan()
    expected = torch.zeros(5, 256, dtype=torch.bool)
    expected[1, 64:128] = expected[3] = True
    assert torch.equal(nan, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 768), (65, 256), (130, 3072)], ids=str)
@pytest.mark.parametrize("span", SPANS)
def test_the_kernel_decodes_w4a8_to_the_bits_of_eager(span, shape, dtype):
    stored = stored_w4a8(*shape, "cuda")
    relative = stored[1].view(torch.uint8)
    relative[0, 3] = 0x7F  # NaN
    with use_backend("eager"):
        expected = dequantize_w4a8(*stored, span, dtype)
    with use_backend("triton"):
        got = dequantize_w4a8(*stored, span, dtype)
        apart = dequantize_w4a8(stored[0].t().contiguous().t(), *stored[1:], span, dtype)
    assert int(got.isnan().sum()) == span
    assert torch.equal(got.nan_to_num(), expected.nan_to_num()) and torch.equal(
        apart.nan_to_num(), got.nan_to_num()
    )


def test_w4a8_says_why_its_kernels_do_not_run():
    why = {"triton": "tensor is on cpu"}
    assert dequantize_w4a8.reasons(*stored_w4a8(2, 64), 64, torch.float32) == why
    weight = torch.zeros(2, 64)
    assert (
        fit_groups.reasons(weight) == nearest_w4a8.reasons(weight, *W4A8Grid().scale(weight)) == why
    )


def test_thresholds_are_the_last_floats_of_their_levels():
    last = torch.tensor(level_thresholds())
    codes = torch.arange(15, dtype=torch.int32)
    assert torch.equal(round_level(last), codes) and torch.equal(
        round_level(last.nextafter(INFINITY)), codes + 1
    )
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(6))
    assert torch.equal((x[:, None] > last).sum(1), round_level(x).long())


def rough_weight(n: int, k: int, device: str) -> torch.Tensor:
    """Many magnitudes, ties, groups and rows of zeros of both signs, numbers below TINY and subnormal ones."""
    weight = torch.randn(n, k, device=device) * torch.logspace(-8, 4, k, device=device)
    weight[n // 2] = weight[n // 2].sign()
    weight[n // 3, : k // 2] = -0.0
    weight[n // 4] = 0
    weight[n // 5] = -1e-40
    return weight


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5, 16), (65, 144), (130, 3072), (3072, 1280)], ids=str)
def test_the_kernels_quantize_w4a8_to_the_bits_of_eager_and_of_the_cpu(shape):
    weight = rough_weight(*shape, "cuda")
    rows = torch.arange(shape[0], device="cuda")[:, None] % 9
    halves = (torch.arange(weight.numel(), device="cuda").view(shape) % 255 - 127) / 2 * (rows + 1)
    steps = (
        (torch.arange(weight.numel() // GROUP, device="cuda") % 127)
        .byte()
        .view(torch.float8_e4m3fn)
    )
    for w in (weight, weight.t().contiguous().t(), halves):  # the last between two INT8 values
        with use_backend("eager"):
            fitted, scale = fit_groups(w), W4A8Grid().scale(w)
            codes = nearest_w4a8(w, *scale)
            ties = nearest_w4a8(w, rows[:, 0] + 1.0, steps.view(len(w), -1))
        with use_backend("triton"):
            got = fit_groups(w)
            assert all(map(torch.equal, got, fitted))
            assert torch.equal(nearest_w4a8(w, *scale), codes)
            assert torch.equal(nearest_w4a8(w, rows[:, 0] + 1.0, steps.view(len(w), -1)), ties)
        here = W4A8Grid().scale(w.cpu())
        assert raw(here.channel) == raw(scale.channel.cpu()) and raw(here.relative) == raw(
            scale.relative.cpu()
        )
        assert torch.equal(W4A8Grid().encode(w.cpu(), here), codes.cpu())


@pytest.mark.gpu
def test_nan_in_a_weight_reaches_the_scales_of_its_group_and_row():
    weight = rough_weight(40, 256, "cuda")
    weight[7, 20] = float("nan")
    with use_backend("eager"):
        expected = fit_groups(weight)
    with use_backend("triton"):
        got = fit_groups(weight)
        channel = W4A8Grid().scale(weight).channel
    assert got[0].isnan().nonzero().tolist() == got[1].isnan().nonzero().tolist() == [[7, 1]]
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, expected, strict=True)
    )
    assert channel.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize(
    "grid", [Mxfp8Grid(), Nvfp4Grid(), W4A8Grid()], ids=["mxfp8", "nvfp4", "w4a8"]
)
class TestEveryGrid:
    def test_rows_do_not_depend_on_their_neighbours_or_on_chunks(self, grid):
        weight = torch.randn(600, 1024, generator=torch.Generator().manual_seed(1))
        weight[-1, 0] = weight.abs().max() + 1  # nvfp4 has one scale for the tensor
        scale = grid.scale(weight)
        whole = grid.encode(weight, scale)
        tail = grid.scale(weight[-2:])
        assert raw(grid.encode(weight[-2:], tail)) == raw(whole[-2:])

    def test_the_reported_error_is_that_of_the_decoded_weight(self, grid):
        weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
        scale = grid.scale(weight)
        codes = grid.encode(weight, scale)
        error, signal, *_ = grid.deviation(weight, codes, scale)
        assert error == pytest.approx(
            float((grid.decode(codes, scale) - weight.float()).square().sum()), rel=1e-5
        )
        assert signal == pytest.approx(float(weight.float().square().sum()), rel=1e-5)

    def test_stochastic_rounding_is_seeded_and_centred(self, grid):
        """Mean of 2^12 draws per weight within 7 sigma (steps are below 0.5), where the largest code does not clip."""
        pattern = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
        weight = pattern.expand(1 << 12, -1).contiguous()
        scale = grid.scale(weight)
        once, again, other = (grid.encode(weight, scale, seed=seed) for seed in (5, 5, 6))
        assert raw(once) == raw(again) != raw(other)
        blocks = pattern.view(-1, 16).abs()
        inside = (blocks < 0.9 * blocks.amax(1, keepdim=True)).view(-1)
        bias = (grid.decode(once, scale).mean(0) - pattern[0])[inside]
        assert bias.abs().max() < 7 * 0.25 / 64

    def test_every_dtype_gives_the_codes_of_its_float32_value(self, grid):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
            wide = weight.float()
            assert raw(grid.encode(weight, grid.scale(weight))) == raw(
                grid.encode(wide, grid.scale(wide))
            )
