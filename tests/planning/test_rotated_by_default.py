"""`int8` and the nodes mean ConvRot where a layer allows it; what is INT8 already is copied."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.errors import SourceError
from fewbits.quant_ops.planning.layer_config import parse_layer_config
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import (
    Recipe,
    parse_wish,
    recipe_from_table,
    recipe_from_toml,
    recipe_to_toml,
)
from fewbits.quant_ops.spec import Header, TensorSpec

AUTO = parse_wish("int8")


def planned(wish, name="blocks.0.mlp", shape=(64, 512)):
    tensors = {f"{name}.weight": TensorSpec(f"{name}.weight", "BF16", shape)}
    recipe = Recipe(wish, preset="none")
    (layer,) = make_plan(Header(tensors, {}, {}), recipe).layers
    return layer


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("int8", "int8_tensorwise:convrot=auto"),
        ("int8:scaling=tensor", "int8_tensorwise:scaling=tensor,convrot=auto"),
        ("int8:convrot_groupsize=64", "int8_tensorwise:convrot=auto,convrot_groupsize=64"),
        ("int8:convrot=false", "int8_tensorwise"),
        ("int8:convrot=true", "int8_tensorwise:convrot=true"),
    ],
)
def test_the_short_name_means_rotation_unless_it_is_stated(text, full):
    assert parse_wish(text) == parse_wish(full)
    assert parse_wish(parse_wish(text).to_text()) == parse_wish(full)


@pytest.mark.parametrize(
    ("columns", "group"),
    [(512, 256), (256, 256), (1152, 64), (1168, 16), (1160, None)],
    ids=["256", "one group", "64", "16", "no group"],
)
def test_a_layer_is_rotated_in_the_largest_group_that_fits_else_in_plain_rows(columns, group):
    layer = planned(AUTO, shape=(64, columns))
    assert (layer.format, layer.options.convrot) == ("int8_tensorwise", group is not None)
    assert layer.options.convrot_groupsize == group
    assert layer.options.scaling == "row"
    assert layer.marker.get("convrot", False) is (group is not None)
    if columns % 256:
        assert f"ConvRot 256 -> {group or 'none'}: K={columns}" in layer.reason


def test_one_scale_and_embedding_tables_are_not_rotated():
    assert not planned(parse_wish("int8:scaling=tensor")).options.convrot
    table = planned(AUTO, "model.embed_tokens", (4096, 512))
    assert (table.format, table.options.convrot) == ("int8_tensorwise", False)


def test_the_full_name_means_plain_rows():
    assert not planned(parse_wish("int8_tensorwise")).options.convrot


def test_recipes_and_layer_configs_say_it_too_and_are_read_back_as_they_were(tmp_path):
    recipe = recipe_from_table(
        {
            "primary": {"format": "int8"},
            "layer_config": {"a": {"format": "int8"}, "b": {"format": "int8", "convrot": False}},
        }
    )
    assert recipe.primary == AUTO
    assert [entry.wish for entry in recipe.layer_config.entries] == [
        AUTO,
        parse_wish("int8_tensorwise"),
    ]
    path = tmp_path / "r.toml"
    path.write_text(recipe_to_toml(recipe))
    assert recipe_from_toml(path) == recipe


def test_a_layer_config_takes_auto_and_refuses_what_is_no_answer():
    config = parse_layer_config({"a": {"format": "int8_tensorwise", "convrot": "auto"}})
    assert config.entries[0].wish == AUTO
    for wrong in ("maybe", 1):
        with pytest.raises(Exception, match="'?convrot'? must be"):
            parse_layer_config({"a": {"format": "int8", "convrot": wrong}})


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(3)
    shapes = {"blocks.0.wide": (48, 512), "blocks.0.odd": (48, 1160), "blocks.0.even": (48, 1152)}
    state = {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "stored",
    ["int8_tensorwise", "int8_tensorwise:convrot=true", "int8", "int8:convrot_groupsize=16"],
)
@pytest.mark.parametrize("requantize", [False, True], ids=["", "requantize"])
def test_rows_in_int8_are_copied_whether_they_are_rotated_or_not(
    model, tmp_path, stored, requantize
):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    quantize_file(model, first, Recipe(parse_wish(stored), preset="none"))
    report = quantize_file(first, second, Recipe(AUTO, preset="none"), requantize=requantize)
    assert {layer.action for layer in report.plan.layers if layer.format} == {"recode"}
    assert report.rounded_twice == ()
    before, after = load_file(first), load_file(second)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_rotation_that_was_stated_is_not_what_plain_rows_are(model, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    quantize_file(model, first, Recipe(parse_wish("int8_tensorwise"), preset="none"))
    stated = Recipe(parse_wish("int8:convrot=true"), preset="none")
    with pytest.raises(SourceError, match="quantized already"):
        quantize_file(first, second, stated)
    report = quantize_file(first, second, stated, requantize=True)
    # K=1160 allows no rotation: plain rows are what the wish becomes there
    assert report.rounded_twice == ("blocks.0.even", "blocks.0.wide")


@pytest.mark.parametrize("wish", ["int8_tensorwise:convrot=true", "mxfp8", "bnb_nf4"])
def test_a_file_is_what_its_own_recipe_asks_for_where_shapes_led_elsewhere(tmp_path, wish):
    state = {"a.weight": torch.randn(48, 1152), "b.weight": torch.randn(33, 65)}
    save_file(state, tmp_path / "model.safetensors")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    recipe = Recipe(parse_wish(wish), preset="none")
    quantize_file(tmp_path / "model.safetensors", first, recipe)
    quantize_file(first, second, recipe)
    assert all(
        torch.equal(load_file(second)[name].float(), tensor.float())
        for name, tensor in load_file(first).items()
    )
