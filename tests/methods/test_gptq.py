"""gptq: less output error on rows it never saw, on every grid; and never worse than nearest."""

import pytest
import torch

from fewbits.kernels.scales import TINY
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.methods import Inputs
from fewbits.quant_ops.methods.inputs import best_damping, damped, upper_root
from fewbits.quant_ops.planning.wish import parse_wish
from support.layers import correlated_rows, heavy_weight
from support.method_cases import FORMATS, run

N, K = 128, 256


def two_halves(rows):
    middle = len(rows) // 2
    first, second = rows[:middle], rows[middle:]
    return Inputs(
        (first / max(len(first), 1) ** 0.5, second / max(len(second), 1) ** 0.5),
        (len(first), len(second)),
    )


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


def test_zeros_keep_their_codes():
    weight = heavy_weight(N, K)
    weight[:, 40:80] = 0
    weight[3] = 0
    found = run(weight, "bnb_nf4", "gptq", inputs=two_halves(correlated_rows(K)))
    decoded = found.grid.decode(found.choice.codes, found.choice.scale)
    assert not decoded[weight.abs() < TINY].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(64, K),
        correlated_rows(K)[:1],
        correlated_rows(K)[:2],
        correlated_rows(K) * 1e-18,
        correlated_rows(K) * 1e15,
        correlated_rows(K) * (torch.arange(K) == 7),
        torch.randn(64, K, generator=torch.Generator().manual_seed(5)).exp(),
    ],
    ids=["rank one", "one row", "two rows", "tiny", "huge", "one channel", "another distribution"],
)
@pytest.mark.parametrize("wish", ["int8_tensorwise", "bnb_nf4", "nvfp4"])
def test_poor_statistics_never_make_it_worse_than_nearest(wish, rows):
    found = run(heavy_weight(32, K), wish, "gptq", inputs=two_halves(rows))
    assert found.choice.objective <= found.choice.objective_nearest
    assert bool(found.error.isfinite().all())


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
