"""Recipes: TOML and command-line text in, one checked object out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.layer_config import parse_layer_config
from fewbits.quant_ops.planning.match import check_pattern, matches
from fewbits.quant_ops.planning.recipe import (
    Draft,
    Recipe,
    Rule,
    Wish,
    draft_from_table,
    draft_from_text,
    parse_rule,
    parse_wish,
    recipe_from_table,
    recipe_from_toml,
    recipe_to_toml,
)

TOML = """
preset = "flux"
seed = 3
[primary]
format = "int8_tensorwise"
scaling = "row"
[fallback]
format = "float8_e4m3fn"
[[rule]]
match = "double_blocks.0.*"
format = "float8_e4m3fn_blockwise"
block_size = 128
[[rule]]
match = "img_in"
keep = true
"""


def test_a_toml_recipe_is_read_whole(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(TOML)
    recipe = recipe_from_toml(path)
    assert recipe == Recipe(
        primary=parse_wish("int8_tensorwise:scaling=row"),
        fallback=parse_wish("float8_e4m3fn"),
        rules=(
            Rule("double_blocks.0.*", parse_wish("float8_e4m3fn_blockwise:block_size=128")),
            Rule("img_in", None),
        ),
        preset="flux",
        seed=3,
    )


def test_defaults_and_stated_defaults_make_the_same_recipe_text():
    assert (
        Recipe(parse_wish("int8_tensorwise")).to_text()
        == Recipe(parse_wish("int8_tensorwise:scaling=row")).to_text()
    )


BAD = {
    "unknown key": ({"primary": {"format": "float8_e4m3fn", "bloc_size": 1}}, "unknown key 'bloc_size', did you mean 'block_size'"),
    "unknown table": ({"primry": {}}, "unknown key 'primry', did you mean 'primary'"),
    "no primary": ({"seed": 1}, "a \\[primary\\] table"),
    "no format": ({"primary": {}}, "'format' is required"),
    "empty format": ({"primary": {"format": ""}}, "unknown format ''"),
    "alias": ({"primary": {"format": "fp8_scaled"}}, "did you mean 'float8_e4m3fn'"),
    "method": ({"primary": {"format": "float8_e4m3fn", "method": "gtpq"}}, "unknown method 'gtpq'; known methods"),
    "text for a number": ({"primary": {"format": "int8_blockwise", "block_size": "64"}}, "block_size must be int, got '64'"),
    "bool for a number": ({"primary": {"format": "int8_blockwise", "block_size": True}}, "block_size must be int, got True"),
    "size not offered": ({"primary": {"format": "int8_blockwise", "block_size": 48}}, "must be one of 16, 32, 64, 128, 256; got 48"),
    "keep with options": ({"primary": {"format": "float8_e4m3fn"}, "rule": [{"match": "x", "keep": True, "format": "y"}]}, "allows no format"),
    "rule without match": ({"primary": {"format": "float8_e4m3fn"}, "rule": [{"keep": True}]}, "needs 'match'"),
    "bad regex": ({"primary": {"format": "float8_e4m3fn"}, "rule": [{"match": "re:(", "keep": True}]}, "not a regular expression"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "message"), BAD.values(), ids=BAD.keys())
def test_a_malformed_recipe_is_refused_with_the_way_out(table, message):
    with pytest.raises(RecipeError, match=message):
        recipe_from_table(table)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.*=float8_e4m3fn", Rule("a.*", parse_wish("float8_e4m3fn"))),
        (
            "a=int8_tensorwise:scaling=tensor",
            Rule("a", parse_wish("int8_tensorwise:scaling=tensor")),
        ),
        ("re:a(=b)?=keep", Rule("re:a(=b)?", None)),
        (
            "re:x.*=int8_blockwise:block_size=64",
            Rule("re:x.*", parse_wish("int8_blockwise:block_size=64")),
        ),
    ],
)
def test_a_rule_is_written_as_pattern_equals_format(text, expected):
    assert parse_rule(text) == expected


@pytest.mark.parametrize("text", ["a", "=float8_e4m3fn", "a=", "a=float8_e4m3fn:scaling"])
def test_a_rule_that_is_not_one_is_refused(text):
    with pytest.raises(RecipeError):
        parse_rule(text)


def test_patterns_are_exact_names_globs_or_regular_expressions():
    assert matches("a.b", "a.b") and not matches("a.b", "a.bc")
    assert matches("a[0].b", "a[0].b")  # the name itself, wildcard characters included
    assert matches("a.*", "a.b.c") and not matches("A.*", "a.b")
    assert matches("re:a.\\d+", "a.12") and not matches("re:a.\\d", "a.12")
    with pytest.raises(RecipeError, match="may not be empty"):
        check_pattern("")


INT8, FP8 = parse_wish("int8_tensorwise"), parse_wish("float8_e4m3fn")


def test_a_draft_over_another_puts_its_rules_first_and_has_the_last_word():
    base = draft_from_table({"primary": {"format": "int8_tensorwise"}, "preset": "flux", "seed": 4,
                             "fallback": {"format": "mxfp8"}, "rule": [{"match": "a", "keep": True}]})  # fmt: skip
    own = Draft(rules=(Rule("b", None),), preset="none", fallback=FP8)
    assert own.over(base).finish() == Recipe(
        INT8, (Rule("b", None), Rule("a", None)), FP8, "none", 4
    )
    assert Draft().over(base) == base and base.over(Draft()) == base
    assert Draft(seed=0).over(base).finish().seed == 0
    assert Draft(preset="auto").over(base).finish().preset == "auto"


@pytest.mark.parametrize(
    "table", [{"primary": {"format": "mxfp8"}}, {"layer_config": {"x": {"skip": True}}}], ids=list
)
def test_what_cannot_give_way_in_part_is_refused_when_both_state_it(table):
    with pytest.raises(
        RecipeError, match=rf"both have a \[{next(iter(table))}\]; delete one of them"
    ):
        draft_from_table(table).over(draft_from_table(table))


def test_a_draft_without_primary_is_no_recipe():
    with pytest.raises(RecipeError, match=r"a \[primary\] table with a format is required"):
        draft_from_text("seed = 1", "pasted").finish()
    with pytest.raises(
        RecipeError, match="recipe pasted: top level: unknown key 'sead', did you mean 'seed'"
    ):
        draft_from_text("sead = 1", "pasted")
    with pytest.raises(RecipeError, match="recipe pasted: .*line 1"):
        draft_from_text("seed 1", "pasted")


def test_entries_of_a_layer_config_leave_to_the_primary_what_they_do_not_say_whoever_states_it_when():
    config = {
        "layer_config": {"x": {"format": "bnb_nf4"}, "y": {"format": "bnb_nf4", "simple": True}}
    }
    primary = {
        "format": "int8_tensorwise",
        "method": "mse_clip",
        "full_precision_matrix_mult": True,
    }
    at_once = recipe_from_table({"primary": primary, **config})
    later = draft_from_table({"primary": primary}).over(draft_from_table(config)).finish()
    assert at_once == later and at_once.to_text() == later.to_text()
    wishes = [entry.wish for entry in later.layer_config.entries]
    assert [wish.method for wish in wishes] == ["mse_clip", "nearest"]
    assert all(wish.options.full_precision_matrix_mult for wish in wishes)


OWN = {"bnb_fp4": "mse_clip"}  # format -> its own method; nearest where it is not listed


@pytest.mark.parametrize("name", FORMATS)
def test_a_wish_without_a_method_means_the_formats_own_and_its_text_leaves_that_out(name):
    own = OWN.get(name, "nearest")
    assert parse_wish(name).method == Wish(name).method == own
    assert (
        parse_wish(f"{name}:method={own}") == parse_wish(name)
        and parse_wish(name).to_text() == name
    )
    (other,) = {"nearest", "mse_clip"} - {own}
    assert parse_wish(parse_wish(f"{name}:method={other}").to_text()).method == other
    assert recipe_from_table({"primary": {"format": name}}).to_json()["primary"]["method"] == own


def test_options_of_a_formats_own_method_need_no_method():
    assert parse_wish("bnb_fp4:highest=1.5") == parse_wish("bnb_fp4:method=mse_clip,highest=1.5")
    with pytest.raises(RecipeError, match="unknown key 'highest'"):
        parse_wish("bnb_nf4:highest=1.5")


@pytest.mark.parametrize(
    ("primary", "methods"),
    [
        ({"format": "int8_tensorwise"}, ["mse_clip", "nearest"]),
        ({"format": "bnb_fp4"}, ["mse_clip", "nearest"]),
        ({"format": "int8_tensorwise", "method": "nearest"}, ["nearest", "nearest"]),
        ({"format": "bnb_fp4", "method": "mse_clip"}, ["mse_clip", "mse_clip"]),
        ({"format": "bnb_fp4", "highest": 1.5}, ["mse_clip", "mse_clip"]),
    ],
    ids=str,
)
def test_an_entry_of_a_layer_config_takes_the_method_that_the_primary_names_else_its_formats_own(
    primary, methods
):
    config = {"x": {"format": "bnb_fp4"}, "y": {"format": "int8_tensorwise"}}
    recipe = recipe_from_table({"primary": primary, "layer_config": config})
    assert [entry.wish.method for entry in recipe.layer_config.entries] == methods
    again = draft_from_text(recipe_to_toml(recipe), "text").finish()
    assert again == recipe and again.to_text() == recipe.to_text()


NAMES = st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12
)  # no halves of surrogate pairs
PATTERNS = NAMES.filter(
    lambda name: not name.startswith(("re:", "search:"))
)  # few would be regular expressions
WISHES = st.sampled_from([
    INT8, FP8, parse_wish("bnb_fp4"), parse_wish("bnb_fp4:highest=1.5"), parse_wish("bnb_nf4:block_size=128,method=svd,early_stop_lr=1e-08,lr_schedule=plateau"),
    parse_wish("int8_tensorwise:convrot=true,convrot_groupsize=64,full_precision_matrix_mult=true"),
])  # fmt: skip
SETTINGS = st.sampled_from(
    [
        {"skip": True},
        {"format": "bnb_fp4", "block_size": 32},
        {"format": "bnb_fp4", "method": "nearest"},
        {"format": "mxfp8", "method": "svd"},
    ]
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    primary=WISHES,
    rules=st.lists(st.tuples(PATTERNS, st.none() | WISHES, st.booleans()), max_size=3),
    fallback=st.none() | WISHES,
    seed=st.integers(0, 2**31),
    config=st.none()
    | st.dictionaries(NAMES.filter(lambda name: not name.startswith("_")), SETTINGS, max_size=3),
)
def test_any_recipe_survives_its_text(primary, rules, fallback, seed, config):
    """Whatever stands in a pattern or a key; the same recipe, so the same bytes from a graph and a command."""
    recipe = Recipe(
        primary,
        tuple(Rule(match, wish, heuristics) for match, wish, heuristics in rules),
        fallback,
        seed=seed,
        layer_config=None if config is None else parse_layer_config(config, unstated=primary),
    )
    again = draft_from_text(recipe_to_toml(recipe), "text").finish()
    assert again == recipe and again.to_text() == recipe.to_text()


KEY = ".".join(["a"] * 40_000)


@pytest.mark.parametrize(
    "text",
    [f"{KEY} = 1", f"[{KEY}]", f'["b".{KEY}]', f"x = {{ a = \"\"\"\n ' \"\"\", {KEY} = 1, c = ' ' }}"],
    ids=["key", "table", "quoted", "behind a text with a quote"],
)  # fmt: skip
def test_a_key_of_very_many_parts_is_refused_before_it_is_parsed(text):
    """The standard library's parser takes half a minute for it."""
    with pytest.raises(RecipeError, match="a key has more than 64 parts"):
        draft_from_text(text, "x.toml")


@pytest.mark.parametrize("text", ["# {}", "x = '{}'", 'x = """\n{}\n"""', 'x = "{}"'])
def test_dots_in_texts_and_comments_join_no_keys(text):
    with pytest.raises(RecipeError, match="unknown key 'x'|primary"):
        draft_from_text(text.format(KEY), "x.toml").finish()
