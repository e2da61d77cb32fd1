"""docs/fit.md says what was measured: fits end right below their targets, and below every uniform format that fits."""

import pytest

from support.harness import pareto, readme

TARGETS = (30, 40, 50, 60)


def measured(way: str, target: int) -> dict:
    (row,) = [row for row in pareto.rows() if (row["way"], row["target"]) == (way, target)]
    return row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", ["fit", "calibrated fit"])
def test_a_fit_ends_within_one_percent_below_its_target(way, target):
    share = measured(way, target)["share"]
    assert 0.99 * target < share <= target


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", ["fit", "calibrated fit"])
def test_a_fit_has_less_error_than_every_uniform_format_that_fits(way, target):
    assert measured(way, target)["error"] < pareto.best_uniform(target)["error"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", ["fit", "calibrated fit"])
def test_a_fit_has_less_error_than_one_threshold_for_all_layers(way, target):
    assert measured(way, target)["error"] < measured("threshold", target)["error"]


@pytest.mark.parametrize("target", [40, 50, 60])
def test_a_calibrated_fit_has_less_error_than_scores_from_gradients(target):
    assert measured("calibrated fit", target)["error"] < measured("gradient", target)["error"]


def test_at_the_smallest_size_it_has_as_much_as_scores_from_gradients():
    fit, gradient = measured("calibrated fit", 30)["error"], measured("gradient", 30)["error"]
    assert fit == pytest.approx(gradient, rel=1e-3)


def test_the_table_of_the_page_is_what_was_measured():
    header = ["target", "fit, calibrated", "fit, no calibration", "best single format that fits", "threshold", "gradient"]  # fmt: skip
    rows = []
    for target in TARGETS:
        best = pareto.best_uniform(target)
        cells = [f"{measured(way, target)['error']:.4f}" for way in ("calibrated fit", "fit")]
        others = [f"{measured(way, target)['error']:.4f}" for way in ("threshold", "gradient")]
        rows.append([f"{target} %", *cells, f"{best['error']:.4f}: `{best['label']}`", *others])
    if readme.WRITE:
        readme.write("fits", header, rows)
    assert readme.table("fits") == [header, *rows]
