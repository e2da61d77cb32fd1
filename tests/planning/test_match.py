"""Patterns from users: what they match, what is refused, and that none of them can hold a server."""

import fnmatch

import pytest

from fewbits.quant_ops.doors import convert_file
from fewbits.quant_ops.errors import QuantError, RecipeError
from fewbits.quant_ops.planning import match
from fewbits.quant_ops.planning.layer_config import parse_layer_config
from fewbits.quant_ops.planning.match import check_pattern, closed, matches
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, Rule, parse_rule, parse_wish
from fewbits.quant_ops.spec import Header, TensorSpec
from support.helpers import flux_shapes

INT8 = parse_wish("int8_tensorwise")
# Each of these takes a backtracking matcher longer than the age of the universe on LONG_NAME.
EXPLODING = [
    r"([\w.]+)+!",
    r"(a|a)*!",
    r"(.*)*!",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(a?){60}a{60}!",
]
LONG_NAME = "a" * 100 + ".b" * 60


@pytest.mark.parametrize("prefix", ["re:", "search:"])
@pytest.mark.parametrize("pattern", EXPLODING)
def test_an_expression_that_explodes_elsewhere_just_does_not_match(pattern, prefix):
    assert not matches(prefix + pattern, LONG_NAME)


@pytest.mark.parametrize("pattern", EXPLODING)
def test_every_way_to_write_a_rule_ends_on_a_long_name(pattern):
    shapes = {f"{LONG_NAME}.weight": (64, 64)}
    header = Header({name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()})
    wish = {"format": "bnb_nf4"}
    recipes = [
        Recipe(INT8, rules=(Rule(f"re:{pattern}", None),)),
        Recipe(INT8, rules=(parse_rule(f"search:{pattern}=keep"),)),
        Recipe(INT8, layer_config=parse_layer_config({pattern: wish}, fullmatch=True)),
    ]
    for recipe in recipes:
        (layer,) = make_plan(header, recipe).layers
        assert layer.format == "int8_tensorwise"


@pytest.mark.parametrize("glob", ["*a" * 1900, "*" * 3900, "[" * 3900, "*?" * 1900, "[a]" * 1300])
def test_a_long_glob_ends_on_a_long_name(glob):
    assert matches(check_pattern(glob), LONG_NAME) == fnmatch.fnmatchcase(LONG_NAME, glob)


@pytest.mark.parametrize("sign", ["[", "a", "*", "?", "(", "re:(", "search:["])
def test_a_pattern_of_100000_characters_is_refused_and_not_printed(sign):
    with pytest.raises(RecipeError, match="characters, allowed are 4000") as refusal:
        Rule(sign * 100_000, None)
    assert len(str(refusal.value)) < 300
    with pytest.raises(RecipeError, match="characters, allowed are 4000") as refusal:
        parse_layer_config({sign * 100_000: {"skip": True}})
    assert len(str(refusal.value)) < 300
    with pytest.raises(RecipeError, match="characters, allowed are 4000"):
        parse_layer_config({sign * 100_000: {"skip": True}}, fullmatch=True)


@pytest.mark.parametrize(
    "pattern",
    ["(?=a)b", "(?!norm).*", "(?<=a)b", r"(a)\1", "(?>a)", "a++", "(?(1)a|b)", "(?P=name)"],
)
def test_what_cannot_be_matched_in_linear_time_is_refused_by_name(pattern):
    with pytest.raises(RecipeError, match="is not a regular expression: .*no look-around, no back"):
        check_pattern(f"re:{pattern}")


@pytest.mark.parametrize("pattern", ["re:(", "search:[", "re:\\", "re:a{9999}", "re:\ud800"])
def test_what_is_no_expression_is_refused(pattern):
    with pytest.raises(RecipeError, match="is not a regular expression"):
        check_pattern(pattern)


def test_an_expression_that_needs_too_much_memory_is_refused():
    with pytest.raises(RecipeError, match="pattern too large"):
        check_pattern(r"re:(?:\pL{300}){3}")


def test_the_high_precision_filter_ends_and_is_checked(tmp_path):
    for pattern in ("(?=a)", "x" * 5000):
        with pytest.raises(QuantError, match="high-precision filter"):
            convert_file(tmp_path / "none", tmp_path / "out", hp_filter=pattern)


# Patterns as users of the classic command write them.
CLASSIC = [
    ("final_layer", "model.final_layer.linear", True),
    (r"\.(img|txt)_mod\.", "double_blocks.0.img_mod.lin", True),
    (r"double_blocks\.(0|1|18)\..*weight$", "double_blocks.18.img_mlp.0", True),
    (r"^blocks\.\d{1,2}\.ffn", "blocks.12.ffn.0", True),
    (r"(?i)NORM", "blocks.0.norm1", True),
    (r"(?P<kind>q|k|v)_proj\.weight", "layers.0.v_proj", True),
    (r"[^a-z]0\.", "blocks.0.x", True),
    (r"\bqkv\b", "attn.qkv", True),
    (r"layers\.(?:[0-4])\.", "layers.7.mlp", False),
]


@pytest.mark.parametrize(("pattern", "name", "found"), CLASSIC)
def test_patterns_of_the_classic_command_match_as_they_did(pattern, name, found):
    import re

    assert matches(f"search:{pattern}", name) is found
    assert bool(re.search(pattern, f"{name}.weight")) is found


@pytest.mark.parametrize(
    "glob", ["[", "a[", "[]", "[!]", "[]]", "a[b]c[", "[[]", "[!a][", "][", "*[*[*]", "[]-a]["]
)
@pytest.mark.parametrize("name", ["[", "a[", "]", "abc[", "b[", "][", "x[y[", "^[", "-["])
def test_a_bracket_without_an_end_is_a_plain_character(glob, name):
    assert fnmatch.fnmatchcase(name, closed(glob)) == fnmatch.fnmatchcase(name, glob)


def test_a_part_pattern_names_one_part_of_a_name_in_any_case():
    assert matches("part:*adaln*", "blocks.0.AdaLN_modulation.1")
    assert matches("part:head", "net.Head")
    assert not matches("part:head", "net.heads.0") and not matches("part:b.c", "a.b.c")


def test_without_the_package_names_and_globs_work_and_expressions_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(match, "re2", None)
    match.matcher.cache_clear()
    assert matches("blocks.*", "blocks.0.x") and matches("img_in", "img_in")
    with pytest.raises(RecipeError, match="needs the package google-re2"):
        matches("re:a.c", "abc")
    match.matcher.cache_clear()
    shapes = {f"model.{name}": shape for name, shape in flux_shapes(64).items()}
    header = Header({name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()})
    assert make_plan(header, Recipe(INT8)).layers


def test_a_layer_config_that_lists_every_layer_asks_only_for_names_that_can_match(monkeypatch):
    """4,000 entries for 2,000 layers took 34 s when each entry was tried on each layer."""
    names = [f"blocks.{at}.proj" for at in range(300)]
    header = Header({f"{n}.weight": TensorSpec(f"{n}.weight", "BF16", (64, 64)) for n in names})
    config = parse_layer_config({name: {"format": "bnb_nf4"} for name in names})
    asked = []
    from fewbits.quant_ops.planning import rules

    def counted(pattern, name):
        asked.append(pattern)
        return matches(pattern, name)

    monkeypatch.setattr(rules, "matches", counted)
    plan = make_plan(header, Recipe(INT8, layer_config=config))
    assert {layer.format for layer in plan.layers} == {"bnb_nf4"}
    assert len(asked) < 200 * len(names)
