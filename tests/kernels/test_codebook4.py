"""NF4, FP4 and E2M1: thresholds at the last bit, the CPU table against the rounding functions, uneven dithering."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.kernels.codebook4 import (
    E2M1,
    FP4,
    FP4_THRESHOLD_BITS,
    NF4,
    NF4_THRESHOLDS,
    FlatGrid,
    fast_codes,
    round_e2m1,
    round_fp4,
    round_nf4,
)
from fewbits.kernels.w4a8 import LEVELS, round_level
from fewbits.quant_ops import reference
from support.vectors import bits, floats

ROUNDINGS = [round_nf4, round_fp4, round_e2m1, round_level]
IDS = ["nf4", "fp4", "e2m1", "w4a8 level"]
INFINITY = torch.tensor(float("inf"))


def nf4_codes(values: list[float]) -> list[int]:
    return FlatGrid(NF4, 64).encode(torch.tensor([values]), torch.tensor([1.0]))[0].tolist()


def fp4_codes(values: list[float]) -> list[int]:
    return FlatGrid(FP4, 64).encode(torch.tensor([values]), torch.tensor([1.0]))[0].tolist()


NF4_BITS = (
    "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff 3df64862 3e5067e0 3e9582d4 3ec753f9 "
    "3f006d04 3f248daf 3f5c89da"
)
FP4_BITS = "3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555"
FP4_VALUES = "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"


def test_nf4_thresholds_have_the_golden_bits():
    assert bits(torch.tensor(NF4_THRESHOLDS)) == NF4_BITS
    assert " ".join(f"{value:08x}" for value in FP4_THRESHOLD_BITS) == FP4_BITS


def test_decoded_tables_have_the_golden_bits():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(NF4.widen(codes), torch.from_numpy(reference.NF4))
    assert bits(FP4.widen(codes[:8])) == FP4_VALUES
    assert torch.equal(FP4.widen(codes[8:]), -FP4.widen(codes[:8]))
    assert bits(FP4.widen(codes[8:9])) == "80000000"
    assert torch.equal(E2M1.widen(codes), torch.from_numpy(reference.E2M1))


def test_nf4_takes_the_upper_code_only_strictly_above_a_threshold():
    for index, threshold in enumerate(floats(NF4_BITS)):
        below, above = torch.nextafter(threshold, -INFINITY), torch.nextafter(threshold, INFINITY)
        assert nf4_codes([float(below), float(threshold), float(above), 1.0])[:3] == [
            index,
            index,
            index + 1,
        ]


def test_fp4_takes_the_larger_magnitude_only_strictly_above_a_threshold_on_both_sides():
    lower, upper = [0, 1, 6, 7, 4, 5, 2], [1, 6, 7, 4, 5, 2, 3]
    for low, high, threshold in zip(lower, upper, floats(FP4_BITS), strict=True):
        below, above = torch.nextafter(threshold, -INFINITY), torch.nextafter(threshold, INFINITY)
        values = [float(below), float(threshold), float(above)]
        assert fp4_codes([*values, 1.0])[:3] == [low, low, high]
        assert fp4_codes([*(-value for value in values), 1.0])[:3] == [low + 8, low + 8, high + 8]


def test_fp4_edge_values_have_the_golden_codes():
    values = [1, -0.5, -0.5833330154418945, -0.58333307, -0.0026, -0.0027, 0.0026, -0.0, 0.0]
    del values[1]
    assert fp4_codes(values) == [3, 13, 10, 8, 9, 0, 0, 0]


def test_e2m1_ties_go_to_the_even_code_and_keep_the_sign_of_zero():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, -0.0])
    assert fast_codes(x, round_e2m1).tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 14, 8]


def test_every_value_of_a_table_is_its_own_code():
    codes = torch.arange(16, dtype=torch.uint8)
    assert nf4_codes(NF4.widen(codes).tolist()) == list(range(16))
    assert fp4_codes(FP4.widen(codes).tolist()) == [
        *range(8),
        0,
        *range(9, 16),
    ]  # -0.0 is not below zero
    assert fast_codes(E2M1.widen(codes), round_e2m1).tolist() == list(range(16))
    assert fast_codes(torch.tensor(LEVELS), round_level).tolist() == list(range(16))


@pytest.mark.parametrize("round_", ROUNDINGS, ids=IDS)
def test_the_cpu_table_equals_the_rounding_function_on_all_kinds_of_floats(round_):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(
        -(2**31), 2**31 - 1, (1 << 20,), generator=generator, dtype=torch.int32
    )
    patterns = patterns.view(torch.float32)
    tables = torch.cat(
        [torch.tensor(LEVELS), NF4.widen(torch.arange(16)), floats(NF4_BITS), floats(FP4_BITS)]
    )
    near = torch.cat(
        [tables, torch.nextafter(tables, INFINITY), torch.nextafter(tables, -INFINITY)]
    )
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38])
    for x in (
        patterns[patterns.isfinite()],
        torch.randn(1 << 18, generator=generator),
        near,
        -near,
        tiny,
    ):
        assert torch.equal(fast_codes(x.contiguous(), round_), round_(x).to(torch.uint8))


@pytest.mark.parametrize("round_", ROUNDINGS, ids=IDS)
@settings(max_examples=200, deadline=None)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_cpu_table_equals_the_rounding_function_for_any_float(round_, value):
    x = torch.tensor([value])
    assert fast_codes(x, round_).tolist() == round_(x).tolist()


@pytest.mark.parametrize("levels", [NF4, FP4], ids=["nf4", "fp4"])
def test_no_other_level_is_nearer_than_the_chosen_one(levels):
    x = torch.rand(1, 4096, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x[0, 0] = 1.0
    codes = FlatGrid(levels, 4096).encode(x, torch.ones(1))
    chosen = (levels.widen(codes) - x).abs()
    best = (levels.widen(torch.arange(16, dtype=torch.uint8))[:, None] - x).abs().amin(0)
    assert (
        chosen - best
    ).max() <= 2.0**-19  # FP4's published thresholds are midpoints to five digits


@pytest.mark.parametrize("shape", [(1, 2), (3, 34), (17, 130), (5, 64)], ids=str)
@pytest.mark.parametrize("group", [32, 64, 4096])
def test_blocks_run_over_the_flattened_weight_and_the_last_may_be_partial(shape, group):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grid = FlatGrid(NF4, group)
    scale = grid.scale(weight)
    flat = weight.flatten()
    expected = [flat[start : start + group].abs().max() for start in range(0, flat.numel(), group)]
    assert torch.equal(scale, torch.stack(expected))
    codes = grid.encode(weight, scale)
    x = flat * (1 / scale.repeat_interleave(group)[: flat.numel()])
    assert torch.equal(codes.flatten(), round_nf4(x).to(torch.uint8))
    decoded = grid.decode(codes, scale)
    error, signal, *_ = grid.deviation(weight, codes, scale)
    assert error == pytest.approx(float((decoded - weight).square().sum()), rel=1e-5)
    assert signal == pytest.approx(float(weight.square().sum()), rel=1e-5)


@pytest.mark.parametrize("levels", [NF4, FP4], ids=["nf4", "fp4"])
def test_stochastic_rounding_gives_the_weight_on_average_also_between_uneven_levels(levels):
    """Mean over 2^16 draws per value; 7 sigma of a gap of 0.3 split in half is 7 * 0.15 / 256 = 0.004."""
    targets = torch.tensor([-0.98, -0.71, -0.69, -0.5, -0.1, 0.0, 0.04, 0.2, 0.45, 0.75, 0.99])
    weight = targets[:, None].expand(-1, 1 << 16).contiguous()
    grid, scale = FlatGrid(levels, 1 << 16), torch.ones(len(targets))
    once, again = (grid.encode(weight, scale, seed=7) for _ in range(2))
    assert torch.equal(once, again)
    assert (levels.widen(once).mean(1) - targets).abs().max() < 0.004
