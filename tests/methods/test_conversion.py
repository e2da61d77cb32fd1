"""A method through the whole pipeline: its options reach it, files repeat byte for byte, the report compares."""

import pytest

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, Rule, parse_wish
from support.helpers import tiny_checkpoint

SHAPES = {
    "blocks.0.proj.weight": (64, 96),
    "blocks.0.proj.bias": (64,),
    "blocks.1.proj.weight": (96, 64),
}
WISH = "int8_tensorwise:method=svd,num_iter=20,min_k=8"


@pytest.fixture
def model(tmp_path):
    return tiny_checkpoint(tmp_path / "model.safetensors", SHAPES)


def convert(model, name, wish=WISH, seed=0, rules=()):
    target = model.with_name(name)
    report = quantize_file(model, target, Recipe(parse_wish(wish), rules, preset="none", seed=seed))
    return target.read_bytes(), report


def test_equal_recipes_give_equal_files_and_the_seed_is_part_of_them(model):
    first, _ = convert(model, "a.safetensors")
    assert first == convert(model, "b.safetensors")[0]
    assert first != convert(model, "c.safetensors", seed=1)[0]


def test_method_options_reach_the_method(model):
    _, short = convert(model, "a.safetensors", "int8_tensorwise:method=svd,num_iter=1,min_k=8")
    _, long = convert(model, "b.safetensors")
    for before, after in zip(short.results, long.results, strict=True):
        assert after.objective < before.objective


def test_a_layers_codes_do_not_depend_on_its_neighbours(model):
    _, both = convert(model, "a.safetensors")
    _, alone = convert(model, "b.safetensors", rules=(Rule("blocks.0.*", None),))
    assert alone.results == both.results[1:]


def test_the_report_compares_every_layer_with_nearest(model):
    _, report = convert(model, "a.safetensors")
    rows = {row["name"]: row for row in report.to_json()["layers"]}
    compared = rows["blocks.0.proj"]["against_nearest"]
    assert compared["stored"] == "svd" and compared["verdict"] == ""
    assert 0 < compared["objective"] < 1 and compared["rel_l2"] <= 1.02
    assert "svd against nearest, median of 2 layers: objective 0." in report.to_text()


def test_nearest_is_compared_with_nothing(model):
    _, report = convert(model, "a.safetensors", "int8_tensorwise")
    assert all(result.against_nearest is None for result in report.results)
    assert "against nearest" not in report.to_text()
