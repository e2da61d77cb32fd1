"""`fewbits quantize --target-size`: the file fits, the recipe repeats it, and what cannot be is refused."""

import json
from dataclasses import replace

import pytest
import torch

from fewbits.quant_ops.doors.fit import (
    ROWS,
    Candidate,
    Way,
    _some_rows,
    _with_effects,
    fit_file,
    least_error_or_uniform,
)
from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.planning.goal import error_goal, memory_goal, size_goal
from fewbits.quant_ops.planning.recipe import Draft, Rule, parse_wish
from support.helpers import fewbits, tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("fit") / "model.safetensors")


def test_the_file_is_as_large_as_the_plan_says_and_within_the_target(model, tmp_path):
    out, recipe = tmp_path / "small.safetensors", tmp_path / "r.toml"
    done = fewbits(
        "quantize", model, "-o", out, "--target-size", "45%", "--save-recipe", recipe, "--json"
    )
    assert done.returncode == 0, done.stderr
    fit = json.loads(done.stdout)["fit"]
    limit = int(0.45 * json.loads(done.stdout)["bytes_before"])
    assert fit["goal"]["bytes"] == limit
    assert 0.99 * limit < out.stat().st_size <= limit
    again = tmp_path / "again.safetensors"
    assert fewbits("quantize", model, "-o", again, "--recipe", recipe).returncode == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_dry_run_says_the_size_and_what_each_format_got(model):
    done = fewbits("quantize", model, "--target-size", "60%", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "% below the limit" in done.stdout and "layers with the largest parts" in done.stdout


def test_more_bytes_mean_less_error_and_the_users_own_rules_stand(model):
    draft = Draft(rules=(Rule("double_blocks.0.img_attn.qkv", None),))
    fits = [
        fit_file(model, lambda whole, share=share: size_goal(f"{share}%", whole), draft)
        for share in (45, 60)
    ]
    assert fits[0].error > fits[1].error > 0
    for fit in fits:
        assert "double_blocks.0.img_attn.qkv" not in {layer.name for layer, _ in fit.chosen}
        (kept,) = [row for row in fit.plan.layers if row.name == "double_blocks.0.img_attn.qkv"]
        assert kept.action == "keep"


@pytest.mark.slow
def test_an_error_is_kept_with_fewer_bytes_the_larger_it_is(model):
    found = [fit_file(model, lambda whole, e=e: error_goal(e)) for e in ("0.004", "2%")]
    assert found[0].error <= 0.004 and found[1].error <= 0.02
    assert found[0].file_bytes > found[1].file_bytes


def test_a_model_that_is_small_enough_is_said_to_fit_as_it_is(model):
    with pytest.raises(RecipeError, match="fits as it is, .* of 12,000,000,000 bytes"):
        fit_file(model, lambda whole: size_goal("12GB", whole))


def test_a_size_that_nothing_reaches_is_refused_with_the_smallest(model):
    with pytest.raises(RecipeError, match="cannot be reached: the .* layers .* at least"):
        fit_file(model, lambda whole: size_goal("5%", whole))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target-size", "45%", "--format", "int8"),
        ("--target-size", "much"),
        ("--target-size", "45%", "--max-error", "0.1"),
        ("--allow", "nf4", "--format", "int8"),
        ("--max-error", "7"),
    ],
    ids=lambda words: " ".join(words),
)
def test_contradictions_are_refused(model, arguments):
    done = fewbits("quantize", model, "--dry-run", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("fewbits: ")


def test_sizes_are_read_as_people_write_them():
    said = {"6GB": 6e9, "5.5 GiB": 5.5 * 2**30, "900 MB": 9e8, "40%": 400, "123": 123}
    assert {text: size_goal(text, 1000).bytes for text in said} == said
    assert memory_goal("10GB", 1000).bytes == 8e9
    assert error_goal("2%").error == 0.02


def test_rows_are_blocks_spread_over_the_whole_layer():
    tall = torch.arange(10 * ROWS)[:, None].expand(-1, 2)
    picked = _some_rows(tall)[:, 0]
    assert len(picked) == ROWS and picked[0] == 0 and picked[-1] == 10 * ROWS - 1
    assert len(_some_rows(tall[:1000])) == 1000


def layers_of(*rows: tuple[float, float, bool]) -> list[Candidate]:
    """Layers of 100 bytes with two formats, of 50 and of 25 bytes, by their errors."""
    half, quarter = map(parse_wish, ("int8_tensorwise", "bnb_nf4"))
    return [
        Candidate(
            name=str(number),
            ways=(Way(None, 100), Way(half, 50, fine), Way(quarter, 25, coarse)),
            kept_by_preset=kept,
        )
        for number, (fine, coarse, kept) in enumerate(rows)
    ]


def test_a_mix_is_taken_where_it_clearly_has_less_error():
    layers = layers_of((0.01, 0.1, False), (0.01, 0.1, False), (0.01, 0.9, False))
    assert least_error_or_uniform(layers, 100) == [2, 2, 1]


def test_one_format_is_taken_where_a_mix_promises_hardly_less():
    """150 bytes hold the half in each layer, with what a mix takes away from one for another."""
    layers = layers_of((0.100, 0.101, False), (0.1, 0.2, False), (0.102, 0.2, False))
    even = least_error_or_uniform(layers, 150)
    assert even == [1, 1, 1]
    spare = least_error_or_uniform(layers, 200)
    assert spare == [1, 1, 0]  # what is left over goes to the layer with the largest error


def test_what_one_format_leaves_over_makes_no_layer_worse():
    layers = layers_of((0.1, 0.11, True), (0.1, 0.11, False), (0.1, 0.11, False))
    for budget in range(75, 301):
        found = least_error_or_uniform(layers, budget)
        assert sum(layer.ways[i].bytes for layer, i in zip(layers, found)) <= budget
    assert least_error_or_uniform(layers, 74) is None


def test_effects_weigh_layers_and_their_median_those_that_were_not_measured():
    first, second, third = layers_of(*[(0.01, 0.1, False)] * 3)
    layers = [replace(first, reach=4.0), replace(second, reach=0.5), third]
    weighed = _with_effects(layers)
    assert [layer.factor for layer in weighed] == [4.0, 0.5, 2.25]
    assert least_error_or_uniform(weighed, 125) == [1, 2, 1]
    assert _with_effects([first, third]) == [first, third]
