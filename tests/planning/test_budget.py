"""The choice of a format per layer under a budget, against every choice that there is."""

import itertools
import random

import pytest

from fewbits.quant_ops.planning.budget import Option, fewest_bytes, hull, least_error


def some_layers(seed: int, count: int, options: int) -> list[list[Option]]:
    """Sizes and costs as formats have them: about halving and quadrupling, with some noise."""
    draw = random.Random(seed)
    layers = []
    for _ in range(count):
        size, weight = draw.randrange(1000, 9000), draw.random() ** 3
        ways = [Option(2 * size, 0.0)]
        for bits in draw.sample(range(3, 15), options - 1):
            cost = weight * 4.0**-bits * draw.uniform(0.5, 2)
            ways.append(Option(size * bits // 8 + draw.randrange(90), cost))
        layers.append(ways)
    return layers


def every_choice(layers):
    for choice in itertools.product(*(range(len(options)) for options in layers)):
        picked = [options[i] for options, i in zip(layers, choice, strict=True)]
        yield sum(o.bytes for o in picked), sum(o.cost for o in picked)


def totals(layers, chosen):
    picked = [options[i] for options, i in zip(layers, chosen, strict=True)]
    return sum(o.bytes for o in picked), sum(o.cost for o in picked)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_choices(seed):
    layers = some_layers(seed, 6, 4)
    whole = sum(max(o.bytes for o in options) for options in layers)
    for share in (0.3, 0.45, 0.6, 0.9):
        budget = int(share * whole)
        fitting = [cost for size, cost in every_choice(layers) if size <= budget]
        found = least_error(layers, budget)
        if not fitting:
            assert found is None
            continue
        size, cost = totals(layers, found)
        assert size <= budget and cost == pytest.approx(min(fitting), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("seed", range(6))
def test_the_fewest_bytes_within_an_error_are_the_fewest_of_all(seed):
    layers = some_layers(seed, 6, 4)
    largest = max(cost for _, cost in every_choice(layers))
    for share in (0.001, 0.03, 0.5):
        limit = share * largest
        size, cost = totals(layers, fewest_bytes(layers, limit))
        assert cost <= limit
        assert size == min(size for size, cost in every_choice(layers) if cost <= limit)


def test_no_error_at_all_keeps_what_it_takes():
    layers = [[Option(10, 0.0), Option(4, 1.0)], [Option(10, 0.0), Option(3, 0.0)]]
    assert fewest_bytes(layers, 0.0) == [0, 1]
    assert fewest_bytes([[Option(4, 1.0)]], 0.5) is None


def test_a_thousand_layers_fill_the_budget_and_more_bytes_are_never_worse():
    layers = some_layers(1, 1000, 6)
    whole = sum(max(o.bytes for o in options) for options in layers)
    before = float("inf")
    for share in (0.3, 0.4, 0.5, 0.6):
        size, cost = totals(layers, least_error(layers, int(share * whole)))
        assert 0.999 * share * whole < size <= share * whole
        assert cost < before
        before = cost


def test_equal_inputs_give_equal_choices_and_order_decides_between_equals():
    layers = [[Option(10, 0.0), Option(5, 1.0)]] * 40
    found = least_error(layers, 5 * 40 + 5 * 7)
    assert found == least_error(layers, 5 * 40 + 5 * 7)
    assert found.count(0) == 7


def test_the_hull_leaves_out_what_is_never_worth_its_bytes():
    options = [Option(10, 0.0), Option(8, 5.0), Option(6, 4.0), Option(5, 9.0), Option(9, 0.5)]
    assert hull(options) == [3, 2, 4, 0]
