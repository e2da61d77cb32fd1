"""One ordered list of rules: tiers, heuristics, parts of a checkpoint, and what the list says about itself."""

import pytest

from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.heuristics import gains_nothing
from fewbits.quant_ops.planning.layer_config import parse_layer_config
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import (
    Recipe,
    Rule,
    parse_rule,
    parse_wish,
    recipe_from_table,
    recipe_from_toml,
    recipe_to_toml,
)
from fewbits.quant_ops.spec import Header, LayerInput, TensorSpec
from support.helpers import flux_shapes

INT8 = parse_wish("int8_tensorwise")


def plan_of(recipe, shapes=None, prefix=""):
    shapes = shapes or flux_shapes(256)
    return make_plan(
        Header({prefix + n: TensorSpec(prefix + n, "BF16", s) for n, s in shapes.items()}), recipe
    )


def row(plan, name):
    return next(layer for layer in plan.layers if layer.name == name)


def test_the_rules_of_a_plan_stand_in_the_documented_order():
    recipe = Recipe(
        INT8,
        rules=(Rule("single_blocks.*", None),),
        fallback=parse_wish("float8_e4m3fn"),
        heuristics=True,
        layer_config=parse_layer_config(
            {"txt_in": {"skip": True}, "_default": {"format": "bnb_nf4"}}
        ),
    )
    labels = [rule.rule for rule in plan_of(recipe).rules]
    expected = ["layer-config 'txt_in'", "layer-config _default", "rule 'single_blocks.*'", "outside the recognised model",
                "preset flux 'img_in'", "heuristics", "primary"]  # fmt: skip
    assert [labels.index(label) for label in expected] == sorted(
        labels.index(label) for label in expected
    )
    assert labels[-1] == "primary"


def test_every_layer_is_decided_by_exactly_one_rule_of_the_list():
    plan = plan_of(
        Recipe(INT8, rules=(Rule("*mlp*", parse_wish("bnb_nf4")), Rule("*.img_mlp.*", None)))
    )
    candidates = [layer for layer in plan.layers if layer.rule]
    assert sum(rule.won for rule in plan.rules) == len(candidates)
    won = {rule.rule: rule.won for rule in plan.rules}
    for label in won:
        assert won[label] == sum(layer.rule == label for layer in candidates)
    assert all(rule.matched >= rule.won for rule in plan.rules)


def test_searched_patterns_see_the_full_key():
    shapes = flux_shapes(256)
    searched = Recipe(
        INT8,
        rules=(
            parse_rule(r"search:^model\.diffusion_model\.double_blocks.*proj\.weight$=bnb_nf4"),
        ),
    )
    plan = plan_of(searched, shapes, "model.diffusion_model.")
    assert row(plan, "model.diffusion_model.double_blocks.0.img_attn.proj").format == "bnb_nf4"
    assert plan_of(searched, shapes).unmatched == (searched.rules[0].match,)


@pytest.mark.parametrize(
    ("shape", "wish", "reason"),
    [
        ((3072, 3072), "int8_tensorwise", "9437184 elements < 15000000 with aspect ratio < 2"),
        ((4096, 4096), "int8_tensorwise", None),
        ((5120, 13824), "int8_tensorwise", None),
        ((18432, 3072), "int8_tensorwise", "aspect ratio 18432:3072 > 4 with a short side < 5120"),
        ((12288, 3072), "int8_tensorwise", None),
        ((3000, 1000), "int8_tensorwise", "long side 3000 < 4096"),
        ((65536, 5120), "int8_tensorwise", None),
        ((8192, 100), "int8_blockwise", "short side 100 < block 128"),
        ((8192, 4100), "int8_blockwise", "K=4100 not divisible by 128"),
        ((4100, 8192), "int8_lodewise", None),
        ((0, 4096), "int8_tensorwise", "aspect ratio 4096:0 > 4 with a short side < 5120"),
    ],
)
def test_heuristics_judge_by_shape(shape, wish, reason):
    assert gains_nothing(LayerInput(shape, "BF16"), parse_wish(wish)) == reason


def test_heuristics_exclude_after_rules_and_before_the_primary():
    plan = plan_of(Recipe(INT8, rules=(Rule("img_in", INT8),), heuristics=True))
    assert row(plan, "img_in").format == "int8_tensorwise"
    assert row(plan, "txt_in").rule == "preset flux 'txt_in'"
    layer = row(plan, "double_blocks.0.img_attn.proj")
    assert (layer.action, layer.rule) == ("keep", "heuristics")
    assert layer.reason == "heuristics: 65536 elements < 15000000 with aspect ratio < 2"
    taken = plan_of(Recipe(INT8, fallback=parse_wish("float8_e4m3fn"), heuristics=True))
    assert row(taken, "double_blocks.0.img_attn.proj").format == "float8_e4m3fn"


def test_a_rule_with_heuristics_keeps_what_gains_nothing():
    shapes = {"a.weight": (4096, 4096), "b.weight": (64, 64)}
    plan = plan_of(Recipe(None, rules=(Rule("*", INT8, heuristics=True),), preset="none"), shapes)
    assert (row(plan, "a").action, row(plan, "b").action) == ("quantize", "keep")
    assert row(plan, "b").rule == "rule '*' heuristics"
    assert not plan.warnings


def test_a_t5_file_loses_its_decoder_and_says_so():
    shapes = {
        "shared.weight": (320, 64), "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
        "encoder.final_layer_norm.weight": (64,), "decoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
        "decoder.final_layer_norm.weight": (64,), "lm_head.weight": (320, 64),
    }  # fmt: skip
    plan = plan_of(Recipe(INT8), shapes)
    dropped = {layer.name for layer in plan.layers if layer.action == "drop"}
    assert dropped == {
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.final_layer_norm",
        "lm_head",
    }
    assert not {spec.name for spec in plan.outputs} & {
        "decoder.final_layer_norm.weight",
        "lm_head.weight",
    }
    assert row(plan, "lm_head").reason == "preset t5: ComfyUI loads only the encoder"


RECIPE = Recipe(
    parse_wish("int8_tensorwise:convrot=true,convrot_groupsize=64,full_precision_matrix_mult=true"),
    rules=(
        parse_rule(r"search:a(?:b|c)=int8_blockwise:block_size=64"),
        Rule(r"re:x\.\d+", None),
        Rule("y*", parse_wish("bnb_nf4:block_size=128"), heuristics=True),
    ),
    fallback=parse_wish("float8_e4m3fn"),
    preset="wan+t5",
    seed=7,
    layer_config=parse_layer_config(
        {"a.*": {"format": "bnb_fp4"}, '"odd"\\': {"skip": True}, "_exclusions": ["*b"], "_default": {"format": "mxfp8"}}
    ),
    heuristics=True,
)  # fmt: skip


def test_a_recipe_survives_its_toml_text(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(recipe_to_toml(RECIPE), encoding="utf-8")
    again = recipe_from_toml(path)
    names = ["a.0", '"odd"\\', "b"]
    assert [r.entry.wish for r in again.layer_config.ranked(names)] == [
        r.entry.wish for r in RECIPE.layer_config.ranked(names)
    ]
    assert again.to_json().keys() == RECIPE.to_json().keys()
    same = {**again.to_json(), "layer_config": None}
    assert same == {**RECIPE.to_json(), "layer_config": None}
    assert recipe_to_toml(again) == recipe_to_toml(RECIPE)


@pytest.mark.parametrize("rule", RECIPE.rules, ids=lambda rule: rule.match)
def test_a_rule_survives_its_command_line_text(rule):
    assert parse_rule(rule.to_text()) == rule


@pytest.mark.parametrize("name", FORMATS)
def test_a_wish_survives_its_command_line_text(name):
    wish = parse_wish(f"{name}:full_precision_matrix_mult=true")
    assert parse_wish(wish.to_text()) == wish
    assert parse_wish(parse_wish(name).to_text()) == parse_wish(name)


def test_a_recipe_may_hold_a_layer_config():
    recipe = recipe_from_table(
        {"primary": {"format": "bnb_nf4"}, "layer_config": {"img_in": {"format": "float8_e4m3fn"}}}
    )
    assert row(plan_of(recipe), "img_in").format == "float8_e4m3fn"
