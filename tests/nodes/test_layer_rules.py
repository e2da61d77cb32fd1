"""Layer Rules and Save Recipe: what a graph says about single layers, and the same in a file for the command."""

import json

import pytest

from fewbits.quant_ops.errors import QuantError, RecipeError
from fewbits.quant_ops.planning.recipe import Draft, Recipe, Rule, parse_wish, recipe_from_toml

FP8, INT8 = parse_wish("float8_e4m3fn"), parse_wish("int8_tensorwise")


@pytest.fixture
def rules(comfy):
    """`rules(pattern="x", ...)` -> what the node gives out."""
    from fewbits.nodes.layer_rules import FewBitsLayerRules

    return lambda **inputs: FewBitsLayerRules.execute(**inputs).args[0]


@pytest.fixture
def recipe_from(comfy):
    from fewbits.nodes.common import recipe_from

    return recipe_from


@pytest.fixture
def output(comfy, tmp_path, monkeypatch):
    """ComfyUI's output folder."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


@pytest.fixture
def save_recipe(comfy, output):
    from fewbits.nodes.layer_rules import FewBitsSaveRecipe

    node = FewBitsSaveRecipe.PREPARE_CLASS_CLONE(None)  # as ComfyUI calls it
    return lambda report, **inputs: node.execute(report, **inputs).args


def test_every_line_is_a_rule_with_the_same_wish(rules):
    made = rules(
        pattern="img_in\n\n re:a=b|c \n",
        format="int8_tensorwise",
        options="scaling = tensor,\nmethod=mse_clip",
    )
    wish = parse_wish("int8_tensorwise:scaling=tensor,method=mse_clip")
    assert made == Draft(rules=(Rule("img_in", wish), Rule("re:a=b|c", wish)))
    assert rules(pattern="x").rules == (Rule("x", None),)
    assert rules(pattern="x", format="mxfp8", options="heuristics=true").rules[0].heuristics
    assert rules() == Draft()


def test_a_chain_puts_the_rules_of_the_last_node_first_and_its_preset_counts(rules):
    first = rules(pattern="a", preset="flux", text='seed = 3\n[[rule]]\nmatch = "b"\nkeep = true')
    last = rules(recipe=first, pattern="c", preset="none")
    assert [rule.match for rule in last.rules] == ["c", "a", "b"]
    assert (last.preset, last.seed) == ("none", 3)
    assert rules(recipe=first, preset="auto").preset == "flux"


def test_a_pasted_text_is_a_layer_config_when_it_starts_with_a_brace_and_toml_otherwise(rules):
    made = rules(text=' {"img_in": {"format": "bnb_nf4"}, "_exclusions": ["txt_in"]}')
    assert [entry.pattern for entry in made.layer_config.entries] == ["img_in", "txt_in"]
    whole = rules(text=r'{"double_blocks\\.\\d+": {"skip": true}}', fullmatch=True)
    assert whole.layer_config.fullmatch
    assert rules(text='[primary]\nformat = "mxfp8"').primary == parse_wish("mxfp8")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pattern": "re:("}, "pattern 're:(' is not a regular expression"),
        ({"pattern": "x", "format": "mxfp8", "options": "scaling=row"}, "format mxfp8 has no option 'scaling'"),
        ({"pattern": "x", "format": "int8_blockwise", "options": "bloc_size=64"}, "did you mean 'block_size'?"),
        ({"pattern": "x", "format": "mxfp8", "options": "method"}, "option 'method' needs a value, as in method=..."),
        ({"options": "method=svd"}, "options 'method=svd' need a pattern and a format to belong to"),
        ({"pattern": "x", "options": "method=svd"}, "options 'method=svd' need a pattern and a format to belong to"),
        ({"text": '{"a": {"format": "fp8_scaled"}}'}, "unknown format 'fp8_scaled', did you mean 'float8_e4m3fn'?"),
        ({"text": '{"a": }'}, "layer-config pasted line 1 column 7"),
        ({"text": '[primry]\nformat = "mxfp8"'}, "recipe pasted: top level: unknown key 'primry', did you mean 'primary'?"),
        ({"text": "img_in: keep"}, "recipe pasted: "),
        ({"fullmatch": True}, "fullmatch is about the keys of a pasted layer-config"),
        ({"recipe": Draft(INT8), "text": '[primary]\nformat = "mxfp8"'}, "both have a [primary]; delete one of them"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_the_node_that_holds_it(rules, inputs, message):
    with pytest.raises(RecipeError) as refused:
        rules(**inputs)
    assert message in str(refused.value)


def test_the_quantize_nodes_own_layers_to_keep_come_before_the_rules(rules, recipe_from):
    recipe = recipe_from(
        format="float8_e4m3fn", keep="b", recipe=rules(pattern="a", format="int8_tensorwise")
    )
    assert recipe == Recipe(FP8, (Rule("b", None), Rule("a", INT8)))


def test_every_node_that_quantizes_takes_a_recipe(comfy):
    from fewbits.nodes.extension import NODES

    schemas = [node.define_schema() for node in NODES]
    taking = [schema for schema in schemas if any(item.id == "recipe" for item in schema.inputs)]
    wanted = [schema.node_id for schema in schemas if schema.node_id.startswith("FewBitsQuantize")]
    assert len(wanted) >= 6
    assert {schema.node_id for schema in taking} == {
        *wanted,
        "FewBitsFitToSize",
        "FewBitsFormatAdvisor",
        "FewBitsLayerRules",
        "FewBitsInspectFile",
    }
    sockets = {item.io_type for schema in taking for item in schema.inputs if item.id == "recipe"}
    assert sockets == {"FEWBITS_RECIPE"} and all(
        item.optional for schema in taking for item in schema.inputs if item.id == "recipe"
    )


def test_preset_and_fallback_of_the_quantize_node_count_unless_left_alone(rules, recipe_from):
    base = rules(text='preset = "flux"\n[fallback]\nformat = "mxfp8"')
    assert recipe_from(format="float8_e4m3fn", recipe=base) == Recipe(
        FP8, (), parse_wish("mxfp8"), "flux"
    )
    stated = recipe_from(
        format="float8_e4m3fn", recipe=base, preset="none", fallback="int8_tensorwise"
    )
    assert stated == Recipe(FP8, (), INT8, "none")


@pytest.mark.parametrize(
    "stated",
    [
        {"scaling": "row"},
        {"block_size": "64"},
        {"method": "svd"},
        {"full_precision_matmul": True},
        {"convrot": "on"},
    ],
    ids=lambda stated: next(iter(stated)),
)
def test_a_recipe_with_a_primary_replaces_the_nodes_and_refuses_inputs_that_would_be_void(
    rules, recipe_from, stated
):
    base = rules(text='[primary]\nformat = "int8_blockwise"\nblock_size = 64')
    wanted = Recipe(parse_wish("int8_blockwise:block_size=64"))
    assert recipe_from(format="float8_e4m3fn", recipe=base) == wanted
    with pytest.raises(RecipeError, match=rf"leave {next(iter(stated))} of this node alone"):
        recipe_from(format="int8_blockwise", recipe=base, **stated)


def test_entries_of_a_layer_config_take_the_method_of_the_node_they_end_in(rules, recipe_from):
    base = rules(text='{"img_in": {"format": "bnb_nf4"}}')
    (entry,) = recipe_from(
        format="float8_e4m3fn", method="mse_clip", recipe=base
    ).layer_config.entries
    assert entry.wish == parse_wish("bnb_nf4:method=mse_clip")


@pytest.mark.parametrize(
    ("inputs", "method"),
    [({}, "mse_clip"), ({"method": "auto"}, "mse_clip"), ({"method": "nearest"}, "nearest")],
    ids=["left out", "auto", "nearest"],
)
def test_auto_is_the_formats_own_method_and_nearest_stays_nearest(recipe_from, inputs, method):
    assert recipe_from(format="bnb_fp4", **inputs).primary == parse_wish(f"bnb_fp4:method={method}")


def test_a_method_equal_to_that_of_the_connected_primary_is_no_contradiction(rules, recipe_from):
    base = rules(text='[primary]\nformat = "bnb_nf4"')
    assert recipe_from(format="bnb_fp4", method="nearest", recipe=base).primary == parse_wish(
        "bnb_nf4"
    )


def test_a_node_refuses_a_recipe_for_a_format_it_does_not_make(rules, model):
    from fewbits.nodes import quantize_model

    base = rules(text='[primary]\nformat = "int8_tensorwise"')
    fp8 = next(node for node in quantize_model.NODES if node.ROW.name == "Quantize FP8")
    node = fp8.PREPARE_CLASS_CLONE(None)
    with pytest.raises(
        RecipeError,
        match="primary format is int8_tensorwise, Quantize FP8 makes float8_e4m3fn, .*take",
    ):
        node.execute(model, format="float8_e4m3fn", recipe=base)


def test_a_report_is_saved_as_the_recipe_that_was_run(
    rules, recipe_from, quantize, model, save_recipe, output
):
    base = rules(
        pattern="double_blocks.0.*",
        format="float8_e4m3fn",
        text='{"img_in": {"format": "bnb_nf4"}}',
    )
    recipe = recipe_from(
        format="int8_tensorwise", scaling="tensor", keep="txt_in", preset="none", recipe=base
    )
    fields = {name: getattr(recipe, name) for name in ("rules", "preset", "layer_config")}
    _, report = quantize(model, recipe.primary.to_text(), **fields)
    path, text = save_recipe(json.dumps(report.to_json()), filename="recipes/mine")
    assert path == str(output / "recipes" / "mine.toml")
    assert (
        recipe_from_toml(path) == recipe
        and (output / "recipes" / "mine.toml").read_text("utf-8") == text
    )
    assert rules(text=text).finish() == recipe
    with pytest.raises(
        RecipeError,
        match="mine.toml exists already in the output folder; choose another filename or turn overwrite on",
    ):
        save_recipe(json.dumps(report.to_json()), filename="recipes/mine.toml")
    save_recipe(json.dumps(report.to_json()), filename="recipes/mine", overwrite=True)
    assert save_recipe(json.dumps(report.to_json()))[0] == ""


@pytest.mark.parametrize("report", ["", "7", "{}", '{"recipe": ""}', '{"plan": {}}'])
def test_what_has_no_recipe_is_refused(save_recipe, report, output):
    with pytest.raises(
        RecipeError, match="this report has no recipe: connect the report of a Quantize node"
    ):
        save_recipe(report, filename="x")
    assert not list(output.iterdir())


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "con"])
def test_a_recipe_outside_the_output_folder_is_refused(save_recipe, name, tmp_path):
    with pytest.raises(QuantError, match="is not allowed"):
        save_recipe('{"recipe": "seed = 0"}', filename=name)
    assert not list(tmp_path.rglob("*.toml"))


@pytest.fixture
def inspect(comfy, model_file, monkeypatch):
    """Inspect File on the random model: inputs -> (text, report)."""
    from fewbits.nodes.bridge import host
    from fewbits.nodes.inspect_file import FewBitsInspectFile

    monkeypatch.setattr(host, "model_path", lambda folder, name: model_file)
    node = FewBitsInspectFile.PREPARE_CLASS_CLONE(None)

    def run(**inputs):
        text, report = node.execute("diffusion_models/flux.safetensors", **inputs).args
        return text, json.loads(report)

    return run


def test_a_preview_says_which_rule_won_and_which_matched_nothing_before_anything_is_converted(
    rules, inspect, save_recipe
):
    base = rules(pattern="double_blocks.0.img_mlp.*\nnothing*", format="float8_e4m3fn")
    text, report = inspect(preview="int8_tensorwise", recipe=base)
    rows = {row["name"]: row for row in report["plan"]["layers"]}
    decided = rows["double_blocks.0.img_mlp.0"]
    assert (decided["format"], decided["rule"]) == (
        "float8_e4m3fn",
        "rule 'double_blocks.0.img_mlp.*'",
    )
    assert rows["img_in"]["rule"] == "preset flux 'img_in'"
    assert report["plan"]["unmatched"] == ["nothing*"]
    lines = text.splitlines()
    assert "rule 'nothing*' matched nothing" in text
    (line,) = [line for line in lines if " double_blocks.0.img_mlp.0 " in line]
    assert line.startswith("float8_e4m3fn") and "[rule 'double_blocks.0.img_mlp.*'" in line
    assert any(line.endswith("rule 'nothing*'  (matched nothing)") for line in lines)
    saved = save_recipe(json.dumps(report))[1]
    assert rules(text=saved).rules == base.rules


def test_a_preview_takes_its_format_from_one_place(rules, inspect):
    whole = rules(text='[primary]\nformat = "mxfp8"')
    assert inspect(recipe=whole)[1]["plan"]["summary"][0]["format"] == "mxfp8"
    with pytest.raises(
        RecipeError, match="recipe says mxfp8 and preview says bnb_nf4; set preview to none"
    ):
        inspect(recipe=whole, preview="bnb_nf4")
    with pytest.raises(RecipeError, match=r"no \[primary\] table; choose in preview"):
        inspect(recipe=rules(pattern="x"))
    assert "plan" not in inspect()[1]


@pytest.mark.parametrize(
    ("inputs", "wish"),
    [
        ({}, "int8"),
        ({"convrot": "auto", "scaling": "row"}, "int8"),
        ({"scaling": "tensor"}, "int8:scaling=tensor"),
        ({"convrot": "on"}, "int8_tensorwise:convrot=true"),
        ({"convrot": "off"}, "int8_tensorwise"),
    ],
    ids=["left out", "auto", "one scale", "on", "off"],
)
def test_the_nodes_rotate_int8_where_a_layer_allows_it_unless_told_otherwise(
    recipe_from, inputs, wish
):
    assert recipe_from(format="int8_tensorwise", **inputs).primary == parse_wish(wish)


def test_a_format_without_rotation_is_asked_for_as_before(recipe_from):
    assert recipe_from(format="float8_e4m3fn").primary == parse_wish("float8_e4m3fn")
    with pytest.raises(RecipeError, match="no option 'convrot'"):
        recipe_from(format="float8_e4m3fn", convrot="on")
