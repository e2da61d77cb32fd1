"""Casts and scales at their edges: overflow, ties, signed zeros, zero blocks, every source dtype, any chunking."""

import pytest
import torch

from fewbits.kernels.codebook4 import E2M1, FP4, NF4, FlatGrid
from fewbits.kernels.grids import TiledGrid, decode, encode
from fewbits.kernels.levels import E4M3, E5M2, INT4, INT8
from fewbits.kernels.mxfp8 import Mxfp8Grid
from fewbits.kernels.nvfp4 import Nvfp4Grid
from fewbits.kernels.scales import CHUNK_ELEMENTS, LONG, TINY, Geometry, scale_from_absmax
from fewbits.quant_ops import reference
from support.vectors import raw

TENSOR, ROW = Geometry(None, None), Geometry(1, None)
ONE = torch.ones(1, 1)


def test_casts_to_e4m3_at_the_edges_are_the_golden_bytes():
    x = [
        0,
        2**-10,
        1.5 * 2**-10,
        2**-9,
        1.5 * 2**-9,
        2.5 * 2**-9,
        17,
        19,
        448,
        463.9,
        1e6,
        -0.0,
        -1e-9,
    ]
    assert raw(encode(torch.tensor([x]), ONE, E4M3, TENSOR)).hex() == "000001010202585a7e7e7e8080"


def test_casts_to_e5m2_at_the_edges_are_the_golden_bytes():
    x = [2**-17, 1.5 * 2**-17, 2**-16, 9, 11, 57344, 1e9, -0.0]
    assert raw(encode(torch.tensor([x]), ONE, E5M2, TENSOR)).hex() == "000101484a7b7b80"


@pytest.mark.parametrize(("levels", "limit"), [(INT8, 127), (INT4, 7)], ids=["int8", "int4"])
def test_integers_round_half_to_even_and_the_lowest_code_is_never_used(levels, limit):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1e9, -1e9]])
    assert encode(x, ONE, levels, TENSOR).tolist() == [[0, 2, 2, 0, -2, -2, limit, -limit]]


@pytest.mark.parametrize(
    ("levels", "table"), [(E4M3, reference.E4M3), (E5M2, reference.E5M2)], ids=["e4m3", "e5m2"]
)
def test_every_code_decodes_to_its_exact_value(levels, table):
    codes = torch.arange(256, dtype=torch.uint8).view(levels.dtype).view(1, 256)
    decoded = decode(codes, ONE, levels, TENSOR)[0]
    assert torch.equal(decoded.nan_to_num(7.0), torch.from_numpy(table).nan_to_num(7.0))
    assert torch.equal(decoded.isnan(), torch.from_numpy(table).isnan())


@pytest.mark.parametrize("levels", [E4M3, E5M2, INT8, INT4], ids=lambda levels: levels.name)
def test_a_zero_block_has_scale_one_and_only_zero_bytes(levels):
    weight = torch.tensor([[-0.0, -(2.0**-90)], [2.0**-81, 0.0]])
    grid = TiledGrid(levels, ROW)
    scale = grid.scale(weight)
    assert scale.tolist() == [[1.0], [1.0]]
    assert not any(raw(grid.encode(weight, scale)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [TENSOR, ROW, Geometry(4, 4), Geometry(1, 8)],
    ids=["tensor", "row", "tile", "group"],
)
def test_codes_of_any_dtype_are_those_of_the_weight_widened_to_float32(dtype, geometry):
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for levels in (E4M3, E5M2, INT8, INT4):
        grid = TiledGrid(levels, geometry)
        scale, wide = grid.scale(weight), grid.scale(weight.float())
        assert torch.equal(scale, wide)
        assert raw(grid.encode(weight, scale)) == raw(grid.encode(weight.float(), wide))


@pytest.mark.parametrize(
    "geometry", [TENSOR, ROW, Geometry(1, 128)], ids=["tensor", "row", "group"]
)
def test_a_weight_of_several_chunks_has_the_codes_of_its_rows(geometry):
    rows = CHUNK_ELEMENTS // 1024 + 5
    weight = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = TiledGrid(INT8, geometry)
    scale = grid.scale(weight)
    tail = scale if geometry is TENSOR else scale[-7:]
    assert torch.equal(grid.encode(weight, scale)[-7:], grid.encode(weight[-7:], tail))
    if geometry is not TENSOR:
        assert torch.equal(grid.scale(weight[-7:]), tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [TENSOR, ROW, Geometry(2, 8), Geometry(1, 8), Geometry(4, None)],
    ids=["tensor", "row", "tile", "group", "rows"],
)
def test_absmax_is_the_largest_magnitude_of_each_tile_and_nan_spreads(geometry, dtype):
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(4)).to(dtype)
    expected = geometry.tiles(weight.float().abs()).amax((1, 3))
    assert torch.equal(geometry.absmax(weight), expected)
    weight[5, 3] = float("nan")
    found = geometry.absmax(weight)
    assert int(found.isnan().sum()) == 1
    assert found.flatten()[geometry.tiles(weight).isnan().any(3).any(1).flatten()].isnan().all()


def test_the_scale_is_one_correctly_rounded_division():
    absmax = torch.rand(100_000, generator=torch.Generator().manual_seed(5))
    for qmax in (7.0, 127.0, 448.0, 2688.0, 57344.0):
        exact = (absmax.double() / qmax).float()
        assert torch.equal(scale_from_absmax(absmax, qmax), exact)
    assert scale_from_absmax(torch.tensor([0.0, TINY / 2, TINY]), 127.0).tolist()[:2] == [1.0, 1.0]


@pytest.mark.parametrize("levels", [E4M3, E5M2, INT8, INT4], ids=lambda levels: levels.name)
def test_stochastic_rounding_is_seeded_and_gives_the_weight_on_average(levels):
    """Mean over 2^16 draws; 7 sigma of a step split in half is 7 * 0.5 / 256 = 0.014 steps."""
    targets = torch.tensor([0.3, -1.7, 5.2, 6.9])
    weight = targets[:, None].expand(-1, 1 << 16).contiguous()
    ones = torch.ones(4, 1)
    once, again = (encode(weight, ones, levels, ROW, seed=3) for _ in range(2))
    assert raw(once) == raw(again)
    if levels.dtype == torch.int8:
        step = 1.0
    else:
        in_an_octave = 8 if levels is E4M3 else 4
        step = targets.abs().log2().floor().exp2() / in_an_octave
    assert ((decode(once, ones, levels, ROW).mean(1) - targets).abs() < 0.014 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [LONG - 1, LONG, LONG + 1])
def test_magnitudes_of_short_and_long_rows_are_those_of_float64(dtype, size):
    rows = torch.randn((9, size), generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1], rows[2], rows[3] = -rows[1].abs(), rows[2].abs(), -0.0
    rows[4, 5], rows[5, 6], rows[6, 7] = float("nan"), float("-inf"), -float("nan")
    rows[7] = 0.0
    rows[7, -1] = -torch.finfo(dtype).smallest_normal / 4  # a subnormal
    found = ROW.absmax(rows)
    assert found.dtype == torch.float32
    expected = rows.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0, equal_nan=True)


CASES = {
    f"{levels.name} {name}": TiledGrid(levels, geometry)
    for levels in (INT8, INT4, E4M3, E5M2, NF4, FP4, E2M1)
    for name, geometry in {"tensor": TENSOR, "row": ROW, "tile": Geometry(16, 64)}.items()
}
CASES |= {"flat": FlatGrid(NF4, 64), "uneven": FlatGrid(FP4, 4096)}
CASES |= {"mxfp8": Mxfp8Grid(), "nvfp4": Nvfp4Grid()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", CASES.values(), ids=CASES)
def test_measuring_while_rounding_gives_the_codes_and_errors_of_one_after_the_other(grid, dtype):
    weight = torch.randn((544, 1088), generator=torch.Generator().manual_seed(0))
    weight[:16, :64] = -0.0  # a zero block of every geometry but whole rows
    weight[16:32, 64:128] *= 1e-5  # so small that nvfp4 stores no scale for it
    weight[32] = -0.0
    weight = weight.to(dtype)
    codes, scale, found = grid.measured(weight)
    plain_codes, plain_scale = grid.nearest(weight)
    assert raw(codes) == raw(plain_codes)
    assert all(map(torch.equal, _tensors(scale), _tensors(plain_scale)))
    expected = grid.deviation(weight, plain_codes, plain_scale)
    # float32 sums of chunks of other sizes
    assert found.error == pytest.approx(expected.error, rel=5e-5)
    assert found.signal == pytest.approx(expected.signal, rel=5e-5)
    assert found.product == pytest.approx(expected.product, abs=1e-6 * expected.signal)
    # taken in units of the scale where there is one: other last bits of the largest codes' values
    one_scale = sum(part.numel() for part in _tensors(scale)) == 1
    assert found.largest == pytest.approx(expected.largest, rel=2e-5 if one_scale else 0)


def _tensors(scale) -> list[torch.Tensor]:
    parts = [scale] if isinstance(scale, torch.Tensor) else list(scale)
    return [part.view(torch.uint8) if part.itemsize == 1 else part for part in parts]
