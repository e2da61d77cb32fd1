"""Linears over stored codes: eager is the spec; on a GPU every kernel errs at most twice as much against float64."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

from fewbits.kernels import choice, runtime
from fewbits.kernels.activations import quantize_activations
from fewbits.kernels.codebook4 import FP4, NF4, FlatGrid
from fewbits.kernels.cuda import skinny, wide
from fewbits.kernels.device import CLASSES, as_if
from fewbits.kernels.dispatch import list_backends, use_backend
from fewbits.kernels.grids import TiledGrid, decode
from fewbits.kernels.kinds import Codes
from fewbits.kernels.levels import E4M3, INT8
from fewbits.kernels.packing import pack_nibbles
from fewbits.kernels.scaled_mm import why_not_scaled_mm
from fewbits.kernels.scales import Geometry

GEOMETRIES = {
    "tensor": Geometry(None, None), "row": Geometry(1, None), "tile 128": Geometry(128, 128),
    "tile 64": Geometry(64, 64), "group 128": Geometry(1, 128), "group 64": Geometry(1, 64),
}  # fmt: skip
LEVELS = [INT8, E4M3]
by_name = pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: levels.name)
by_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def tiled(n, k, levels, geometry, device="cpu", spread=1.0):
    weight = (
        torch.randn(n, k, device=device)
        / k**0.5
        * torch.logspace(-spread, spread, k, device=device)
    )
    weight[: geometry.rows or 1, : geometry.cols or 1] = 0
    grid = TiledGrid(levels, geometry)
    scale = grid.scale(weight)
    return grid.encode(weight, scale), scale


def four_bit(n, k, levels, group, device="cuda"):
    weight = torch.randn(n, k, device=device) / k**0.5
    grid = FlatGrid(levels, group)
    absmax = grid.scale(weight)
    return pack_nibbles(grid.encode(weight, absmax), high_first=True), absmax


def exact(x, codes, scale, levels, geometry, bias, rounded):
    """The product in float64; `rounded` says whether x is quantized first."""
    with use_backend("eager"):
        weight = decode(codes, scale, levels, geometry).double()
        if rounded:
            x = decode(
                *quantize_activations(x, levels, geometry.cols), levels, Geometry(1, geometry.cols)
            )
    return x.double() @ weight.t() + (0 if bias is None else bias.double())


@by_name
@by_geometry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_multiplies_quantized_activations(levels, geometry, dtype):
    codes, scale = tiled(128, 256, levels, geometry)
    x, bias = torch.randn(5, 256).to(dtype), torch.randn(128).to(dtype)
    out = runtime.linear_tiles(x, codes, scale, levels, geometry, bias)
    truth = exact(x, codes, scale, levels, geometry, bias, rounded=True)
    assert out.dtype == dtype
    step = max(torch.finfo(dtype).eps, 1e-6)
    assert (out.double() - truth).abs().max() <= step * truth.abs().max()
    plain = exact(x, codes, scale, levels, geometry, bias, rounded=False)
    error = (truth - plain).norm() / plain.norm()
    assert (
        1e-3 < error < 0.04
    )  # 8 bits of activations: about 0.008 (INT8) and 0.027 (FP8), and never nothing


@by_name
def test_zero_tokens_give_the_bias_and_nan_stays_in_its_token(levels):
    geometry = Geometry(1, 64)
    codes, scale = tiled(32, 128, levels, geometry)
    x = torch.randn(3, 128)
    x[0], x[1, 7] = 0, float("nan")
    out = runtime.linear_tiles(x, codes, scale, levels, geometry, torch.ones(32))
    assert torch.equal(out[0], torch.ones(32)) and out[1].isnan().all() and out[2].isfinite().all()


def test_a_four_bit_linear_on_the_cpu_is_the_decoded_product_in_pieces():
    packed, absmax = four_bit(1500, 2048, NF4, 64, "cpu")
    x, bias = torch.randn(3, 2048), torch.randn(1500)
    weight = runtime.dequantize_flat4(packed, absmax, NF4, 64, torch.float32)
    out = runtime.linear_flat4(x, packed, absmax, NF4, 64, bias)
    assert torch.allclose(out, linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_every_op_says_why_a_kernel_does_not_run():
    codes, scale = tiled(64, 64, INT8, Geometry(1, None))
    arguments = (torch.randn(2, 64), codes, scale, INT8, Geometry(1, None), None)
    assert list_backends()["linear_tiles"] == [
        "torch",
        "hopper",
        "cuda",
        "triton",
        "scratch",
        "dequantize",
        "eager",
    ]
    assert set(runtime.linear_tiles.reasons(*arguments).values()) == {"tensor is on cpu"}


def decisions(gpu, levels, geometry, n=12288, k=3072, rows=(16, 64, 256, 1024, 4608)):
    """rows of x -> what multiplies them on a class of GPU."""
    codes = torch.empty(n, k, dtype=levels.dtype, device="meta")
    scale = torch.empty(geometry.grid_shape((n, k)), device="meta")
    with as_if(gpu):
        return {
            m: runtime.linear_tiles.decide(rows_of(m, k), codes, scale, levels, geometry, None)
            for m in rows
        }


def four_bit_decisions(gpu, n, k, rows):
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device="meta")
    absmax = torch.empty(n * k // 64, device="meta")
    with as_if(gpu):
        found = [
            runtime.linear_flat4.decide(rows_of(m, k), packed, absmax, NF4, 64, None) for m in rows
        ]
    return [decision.backend for decision in found]


def rows_of(m, k):
    return torch.empty(m, k, dtype=torch.bfloat16, device="meta")


def test_which_kernel_runs_int8_rows_at_16_and_why_is_one_call():
    found = decisions(CLASSES["sm_90"], INT8, Geometry(1, None))[16]
    assert found.backend == "cuda" and found.why.startswith("M=16 .0141 / .0149")
    found = decisions(CLASSES["sm_86"], INT8, Geometry(1, None))[64]
    assert found.backend == "triton" and found.why == choice.NOT_MEASURED
    found = decisions(CLASSES["sm_75"], INT8, Geometry(1, None))[16]
    assert found.backend == "triton" and found.cannot == {"cuda": "sm_75 is older than sm_80"}


def test_amd_gpus_get_no_kernel_of_ours():
    """RDNA1 and RDNA2 hang in Triton matmuls; none is measured, so none is used."""
    amd = replace(CLASSES["sm_90"], amd=True)
    for levels in LEVELS:
        for found in decisions(amd, levels, Geometry(1, None)).values():
            assert found.backend == "dequantize"
            assert all(reason.startswith("AMD GPU") for reason in found.cannot.values())


def test_small_and_large_weights_are_decoded_from_fewer_rows_on():
    other = CLASSES["sm_86"]
    assert four_bit_decisions(other, 12288, 3072, (16, 32, 33)) == ["cuda", "cuda", "dequantize"]
    for n, k in ((1280, 1280), (5120, 13824)):
        assert four_bit_decisions(other, n, k, (16, 17)) == ["cuda", "dequantize"]


def test_hoppers_own_kernel_is_taken_where_it_was_faster():
    hopper, rows = CLASSES["sm_90"], (32, 33, 256, 512, 513)
    assert four_bit_decisions(hopper, 12288, 3072, rows) == [
        "cuda", "hopper", "hopper", "scratch", "scratch"]  # fmt: skip
    assert four_bit_decisions(hopper, 5120, 13824, (256, 257)) == ["hopper", "dequantize"]
    tiles = decisions(hopper, INT8, Geometry(128, 128), rows=(64, 256, 512, 4608))
    assert [found.backend for found in tiles.values()] == ["triton", "hopper", "scratch", "scratch"]
    assert (
        decisions(hopper, INT8, Geometry(1, None), 1280, 1280, (256,))[256].backend == "dequantize"
    )


@pytest.mark.parametrize("table", [choice.HOPPER, choice.OTHER], ids=["Hopper", "other"])
def test_every_product_has_a_row_and_every_row_says_why(table):
    for name, rows in table.items():
        assert rows[-1] is choice.DECODED and name in choice.HOPPER
        assert all(row.why for row in rows)


@pytest.mark.parametrize(
    ("kind", "group", "rows"), [(4, 64, 1), (8, None, 1), (9, 128, 128), (8, 64, 64), (9, 64, 1)]
)
def test_tiles_for_hopper_fit_and_share_out_all_multiprocessors(kind, group, rows):
    scaling = wide.Scaling(Codes(kind), group, rows)
    for m in (33, 256, 300, 4608):
        for n, k in ((12288, 3072), (3072, 15360), (1280, 1280), (8, 128)):
            tile = wide.tile_for(scaling, m, n, k, 132)
            assert wide.shared_bytes(scaling, tile) <= wide.SHARED_BYTES
            if (n, k) == (3072, 15360) and m <= 256:
                assert tile.needed(*scaling.factors(m, n)) * tile.split >= 90
    sums = 64 if kind != 8 else 128
    assert wide._instruction(Codes(kind), torch.bfloat16, 2 * sums).count("d[") == sums


@pytest.mark.parametrize(("m", "groups"), [(129, 3), (128, 1), (1, 4), (6, 1)])
def test_scales_of_x_lie_where_the_copy_engine_can_read_them(m, groups):
    scale = torch.rand(groups, m).t()
    for given in (
        scale,
        scale.contiguous(),
        torch.rand(groups, m + -m % 4)[:, :m].copy_(scale.t()).t(),
    ):
        got, pitch = wide._in_columns(given)
        assert torch.equal(got, scale) and pitch % 4 == 0 and pitch >= m
        assert torch.equal(got.as_strided((groups, m), (pitch, 1)), scale.t())


def test_hoppers_kernel_says_which_shapes_it_takes():
    why = wide.why_not_shape
    assert (
        why(264, 192, torch.uint8, 64, torch.bfloat16)
        is None
        is why(8, 128, torch.int8, 128, torch.float16)
    )
    assert why(8, 16, torch.float8_e4m3fn, None, torch.bfloat16) is None
    assert (
        why(257, 192, torch.uint8, 64, torch.bfloat16)
        == "257x192 is not made of multiples of 8 and 32"
    )
    assert why(8, 96, torch.uint8, 32, torch.bfloat16) == "groups of 32 in K=96"
    assert why(8, 192, torch.int8, 128, torch.bfloat16) == "groups of 128 in K=192"
    assert why(8, 64, torch.int8, None, torch.float32) == "float32 input: only 16-bit floats"


@pytest.mark.parametrize("codes", [torch.uint8, torch.int8], ids=["4-bit", "8-bit"])
@pytest.mark.parametrize("major", [8, 9, 12])
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_the_skinny_kernel_fits_every_gpu(kilobytes, major, codes):
    gpu = replace(CLASSES["sm_90"], capability=(major, 0), shared_bytes=kilobytes * 1024)
    for m in (1, 3, 8, 16, 32, 33, 64, 500):
        for n in (64, 3072, 12288):
            work = skinny.work_for(skinny.tokens_for(m), n, codes, gpu)
            assert (
                skinny.shared_bytes(codes, work) <= kilobytes * 1024
                and min(work) >= 1
                and work.stages >= 2
            )
            assert work.tokens == skinny.tokens_for(m) or kilobytes < 227
            assert work.rows * work.split <= 16 and (work.cluster == 1 or major >= 9)


# GPU ----------------------------------------------------------------------------------------------------------------

SIZES = [
    (512, 512, 1024),
    (1, 1, 64),
    (2, 17, 192),
    (16, 257, 1088),
    (17, 130, 320),
    (64, 64, 128),
    (129, 384, 1024),
    (300, 256, 3200),
]
ROUNDED = ("torch", "hopper", "triton")  # backends that quantize x


def hopper_cannot(x, codes, group):
    return wide.why_not_device(x) or wide.why_not_shape(
        len(codes), x.shape[1], codes.dtype, group, x.dtype
    )


def close(got, truth, eager, dtype):
    allowed = 2 * (eager.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    return got.dtype == dtype and (got.double() - truth).abs().max() <= allowed


@pytest.mark.gpu
@by_name
@by_geometry
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("backend", ["torch", "hopper", "cuda", "triton", "dequantize"])
def test_8_bit_linears_err_at_most_twice_as_much_as_eager(backend, size, geometry, levels):
    m, n, k = size
    n, k = (
        -(-n // (geometry.rows or 1)) * (geometry.rows or 1),
        -(-k // (geometry.cols or 1)) * (geometry.cols or 1),
    )
    codes, scale = tiled(n, k, levels, geometry, "cuda")
    if backend == "torch" and why_not_scaled_mm(
        torch.ones(m, k, device="cuda", dtype=torch.bfloat16), codes, geometry
    ):
        return  # INT8, other blocks or odd sizes: torch has no product for them
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype == torch.float32 and (
            backend in ("cuda", "hopper") or (backend == "triton" and levels is E4M3)
        ):
            continue
        if backend == "torch" and dtype != torch.bfloat16:
            continue
        longer = torch.randn(m, k + 16, device="cuda").to(dtype)
        x, bias = longer[:, :k], torch.randn(n, device="cuda").to(dtype)
        if backend == "hopper" and hopper_cannot(x, codes, geometry.cols):
            return
        truth = exact(x, codes, scale, levels, geometry, bias, rounded=backend in ROUNDED)
        with use_backend("eager"):
            if backend in ROUNDED:
                eager = runtime.linear_tiles(x, codes, scale, levels, geometry, bias)
            else:
                eager = linear(x, decode(codes, scale, levels, geometry).to(dtype), bias)
        with use_backend(backend):
            for b, expected in ((bias, truth), (None, truth - bias.double())):
                run = lambda b=b: runtime.linear_tiles(x, codes, scale, levels, geometry, b)  # noqa: B023, E731
                got = run()
                assert close(got, expected, eager, dtype), (got.double() - expected).abs().max()
                assert torch.equal(got, run())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 40, 64, 100])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (64, 64, 64),
        (1, 64, 64),
        (257, 192, 64),
        (264, 192, 64),
        (3072, 1152, 128),
        (768, 12288, 64),
        (65, 96, 32),
    ],
)
@pytest.mark.parametrize("levels", [NF4, FP4], ids=lambda levels: levels.name)
@pytest.mark.parametrize("backend", ["hopper", "cuda"])
def test_4_bit_linears_err_at_most_twice_as_much_as_eager(backend, levels, n, k, group, m, dtype):
    packed, absmax = four_bit(n, k, levels, group)
    x, bias = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    if backend == "hopper" and hopper_cannot(x, packed, group):
        return
    with use_backend("eager"):
        weight = runtime.dequantize_flat4(packed, absmax, levels, group, torch.float32).double()
        eager = runtime.linear_flat4(x, packed, absmax, levels, group, bias)
    truth = x.double() @ weight.t() + bias.double()
    with use_backend(backend):
        for b, expected in ((bias, truth), (None, truth - bias.double())):
            got = runtime.linear_flat4(x, packed, absmax, levels, group, b)
            assert close(got, expected, eager, dtype)
            assert torch.equal(
                got, runtime.linear_flat4(x, packed, absmax, levels, group, b)
            )  # no atomics


@pytest.mark.gpu
@pytest.mark.parametrize("family", wide.COSTS)
@pytest.mark.parametrize("split", wide.SPLITS)
def test_every_tile_of_hoppers_kernel_multiplies(split, family):
    """Sizes that no tile divides, runs of K shorter than the ring, and blocks without any of it."""
    formats = {
        "row": [(INT8, None, 1), (E4M3, None, 264)], "4-bit": [(NF4, 64, 1), (FP4, 128, 1)],
        "tiles": [(INT8, 128, 128), (E4M3, 64, 64)], "groups": [(INT8, 128, 1), (E4M3, 64, 1)],
    }  # fmt: skip
    for levels, group, rows in formats[family]:
        n = 384 if family == "tiles" else 264
        for m, k in ((1, 128), (75, 384), (300, 2176), (530, 512)):
            x, bias = (
                torch.randn(m, k, device="cuda").bfloat16(),
                torch.randn(n, device="cuda").bfloat16(),
            )
            if hopper_cannot(x, torch.empty(n, 0, dtype=levels.dtype), group):
                return
            geometry = Geometry(None if rows == n else rows, group)
            if family == "4-bit":
                codes, scale = four_bit(n, k, levels, group)
                quantized, values = (x, None), runtime.code_values(levels)
                weight = runtime.dequantize_flat4(codes, scale, levels, group, torch.bfloat16)
                truth = x.double() @ weight.double().t() + bias.double()
            else:
                codes, scale = tiled(n, k, levels, geometry, "cuda")
                quantized, values = quantize_activations(x, levels, group), None
                truth = exact(x, codes, scale, levels, geometry, bias, rounded=True)
            for tile in wide.COSTS[family]:
                tile = tile._replace(split=split)
                inputs = *quantized, codes, scale, bias, x.dtype, group, rows, values, tile
                got = wide.multiply(*inputs)
                # bfloat16's own rounding, and what FP8 tensor cores drop of each addend
                assert (got.double() - truth).abs().max() <= 1.5 * torch.finfo(
                    x.dtype
                ).eps * truth.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "cuda", "triton", "dequantize"])
@by_name
@by_geometry
def test_extreme_scales_and_nan_come_through(backend, levels, geometry):
    codes, scale = tiled(128, 256, levels, geometry, "cuda", spread=6.0)
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    x[0], x[1, 3], x[2], x[3] = 0, float("nan"), x[2] * 1e30, x[3] * 1e-30
    if backend == "hopper" and hopper_cannot(x, codes, geometry.cols):
        return
    truth = exact(x, codes, scale, levels, geometry, None, rounded=backend in ROUNDED)
    with use_backend(backend):
        out = runtime.linear_tiles(x, codes, scale, levels, geometry, None)
    assert not out[0].any() and out[1].isnan().all()
    for row in (2, 3, 4):
        assert (out[row].double() - truth[row]).abs().max() <= 0.02 * truth[row].abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_256_codes_decode_exactly_in_the_skinny_kernel(dtype):
    """x picks single weights; FP8's NaN codes give NaN."""
    every = torch.arange(256, dtype=torch.uint8, device="cuda").view(4, 64)
    picks = torch.eye(64, device="cuda", dtype=dtype)
    one = torch.ones(1, 1, device="cuda")
    for levels in (INT8, E4M3):
        codes = every.view(levels.dtype)
        rows = codes.repeat(1, 1)
        if levels is E4M3:  # a NaN weight makes its whole row NaN: zero times NaN
            assert skinny.multiply(picks, rows, one, None, None, 4).isnan().any(0).tolist() == [
                False,
                True,
                False,
                True,
            ]
            rows = torch.where(every & 127 == 127, 0, every).view(levels.dtype)
        got = skinny.multiply(picks, rows, one, None, None, 4)
        assert torch.equal(got.t().float(), rows.float())


@pytest.mark.gpu
def test_linears_are_captured_by_a_cuda_graph():
    codes, scale = tiled(256, 512, INT8, Geometry(128, 128), "cuda")
    packed, absmax = four_bit(256, 512, NF4, 64)
    hopper = not hopper_cannot(torch.empty(1, 512, dtype=torch.bfloat16, device="cuda"), codes, 128)
    for m, backend in ((1, None), (16, None), (300, None), (48, "hopper" if hopper else None)):
        x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)

        def run(x=x, backend=backend):
            with use_backend(backend) if backend else nullcontext():
                return (
                    runtime.linear_tiles(x, codes, scale, INT8, Geometry(128, 128), None),
                    runtime.linear_flat4(x, packed, absmax, NF4, 64, None),
                )

        expected = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
