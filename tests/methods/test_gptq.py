"""gptq: less output error on rows it never saw, on every grid; and never worse than nearest."""

import pytest
import torch

from fewbits.kernels.scales import TINY
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.methods import Inputs
from fewbits.quant_ops.methods.inputs import best_damping, damped, upper_root
from fewbits.quant_ops.planning.wish import parse_wish
from fewbits.quant_ops.spec import LayerInput
from support.layers import correlated_rows, heavy_weight
from support.method_cases import FORMATS, run

N, K = 128, 256


def two_halves(rows):
    middle = len(rows) // 2
    halves = rows[:middle], rows[middle:]
    counts = tuple(map(len, halves))
    first, second = (as_few_rows(half / max(len(half), 1) ** 0.5) for half in halves)
    return Inputs((first, second), counts)


def as_few_rows(half):
    """The second moments of all of its rows, in no more rows than channels, as calibration has them."""
    return half if len(half) <= half.shape[1] else torch.linalg.qr(half).R


def output_error(error, rows):
    return float((rows @ error.T).norm())


@pytest.mark.slow
@pytest.mark.parametrize("wish", FORMATS)
def test_the_output_error_on_other_rows_falls(wish):
    """Measured: .28 (int8, one scale) to .75 (asym_w4a8_int8); one seed, rounding is exact."""
    rows = correlated_rows(K, 4096)
    seen, unseen = rows[:2048], rows[2048:]
    found = run(heavy_weight(N, K), wish, "gptq", inputs=two_halves(seen))
    assert not found.choice.verdict
    chosen = parse_wish(wish)
    unseen = get_format(chosen.format).prepare(unseen, chosen.options)
    ratio = output_error(found.error, unseen) / output_error(found.error_nearest, unseen)
    assert ratio < 0.85
    assert found.objective_ratio < 0.85


SHARED = "float8_e4m3fn", "int8_tensorwise", "int8_blockwise", "bnb_nf4", "nvfp4"
ROTATED = "int8_tensorwise:convrot=true,convrot_groupsize=64", "asym_w4a8_int8:convrot_groupsize=64"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "wish"),
    [
        *(("factors", wish) for wish in (*SHARED, *ROTATED)),
        ("power", "bnb_nf4"),
        ("neighbours", "bnb_nf4"),
    ],
)
def test_inputs_that_have_much_in_common_lose_a_third_of_the_error(kind, wish):
    """A third as many rows as channels; the layer of benchmarks/calibration_gpu.py in small."""
    rows = correlated_rows(384, 128 + 1024, kind=kind)
    found = run(heavy_weight(128, 384), wish, "gptq", inputs=two_halves(rows[:128]))
    chosen = parse_wish(wish)
    unseen = get_format(chosen.format).prepare(rows[128:], chosen.options)
    ratio = output_error(found.error, unseen) / output_error(found.error_nearest, unseen)
    assert ratio <= 0.64


def test_zeros_keep_their_codes():
    weight = heavy_weight(N, K)
    weight[:, 40:80] = 0
    weight[3] = 0
    found = run(weight, "bnb_nf4", "gptq", inputs=two_halves(correlated_rows(K)))
    decoded = found.grid.decode(found.choice.codes, found.choice.scale)
    assert not decoded[weight.abs() < TINY].any()


def poor_statistics(k):
    generator = torch.Generator().manual_seed(5)
    rows = correlated_rows(k, 64)
    yield "rank one", torch.ones(64, k)
    yield "one row", rows[:1]
    yield "two rows", rows[:2]
    yield "tiny", rows * 1e-18
    yield "huge", rows * 1e15
    yield "one channel", rows * (torch.arange(k) == 7)
    yield "half of the channels", rows * (torch.arange(k) % 2)
    yield "one half zero", torch.cat([rows, torch.zeros_like(rows)])
    yield "channels from 1e-6 to 1e6", rows * torch.logspace(-6, 6, k)
    yield "another distribution", torch.randn(64, k, generator=generator).exp()


def shapes_of(wish):
    """Odd ones and even ones, those of them that the format takes."""
    chosen = parse_wish(wish)
    for shape in ((33, 80), (17, 96), (32, 128), (128, 128), (256, 128)):
        if get_format(chosen.format).check(LayerInput(shape, "F32"), chosen.options) is None:
            yield shape


@pytest.mark.slow
@pytest.mark.parametrize("wish", FORMATS)
def test_poor_statistics_never_make_it_worse_than_nearest(wish):
    shapes = list(shapes_of(wish))[:2]
    assert shapes
    for n, k in shapes:
        weight = heavy_weight(n, k)
        weight[3] = 0
        for name, rows in poor_statistics(k):
            found = run(weight, wish, "gptq", inputs=two_halves(rows))
            assert found.choice.objective <= found.choice.objective_nearest, (n, k, name)
            assert bool(found.error.isfinite().all()), (n, k, name)


def test_what_repeats_only_in_one_half_is_damped_away():
    """Halves that agree take the smallest damping that pays; halves of other directions a large."""
    generator = torch.Generator().manual_seed(3)
    common = correlated_rows(K, 8192)
    agreeing = best_damping(two_halves(common))
    alien = torch.randn(4, K, generator=generator)
    first = torch.randn(2048, 4, generator=generator) @ alien + 0.05 * common[:2048]
    second = torch.randn(2048, K, generator=generator)
    differing = best_damping(two_halves(torch.cat([first, second])))
    assert agreeing < 0.1 < differing


def test_the_upper_root_gives_the_matrix_back():
    rows = correlated_rows(48, 64)
    gram = damped(rows.T @ rows / 64, 0.1)
    root = upper_root(gram)
    assert torch.equal(root, root.triu())
    torch.testing.assert_close(root @ root.T, gram)
    assert upper_root(-gram) is None
