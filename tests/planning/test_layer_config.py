"""The layer-config JSON: ranking as documented, every problem found at once, warnings that help."""

import json
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.planning import layer_config
from fewbits.quant_ops.planning.layer_config import (
    LayerConfigError,
    load_layer_config,
    parse_layer_config,
    parse_layer_config_text,
    pattern_rank,
    specificity,
)
from fewbits.quant_ops.planning.match import matches
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, Rule, parse_wish
from fewbits.quant_ops.spec import Header, TensorSpec
from support.helpers import flux_shapes

FP8 = {"format": "float8_e4m3fn"}
# Winner first: pattern, rank, literal length, wildcards
ATTENTION = [
    ("double_blocks.0.img_attn.proj", 0, 29, 0),
    ("double_blocks.[0-3].img_attn.*", 1, 24, 2),
    ("double_blocks.0.*", 1, 16, 1),
    ("*.0.img_attn.proj", 1, 16, 1),
    ("*img_attn.proj", 2, 13, 1),
    ("*attn*", 2, 4, 2),
    ("*.0.*", 2, 3, 2),
    ("double_blocks.?.img_*", 3, 19, 2),
    ("double_blocks.*", 3, 14, 1),
    ("*", 4, 0, 1),
]
FINAL = [
    ("final_layer.linear", 0, 18),
    ("*final_layer.linear*", 2, 18),
    ("*linear", 2, 6),
    ("final_layer.*", 3, 12),
]
MLP = [("blocks.12.*", 1, 10), ("blocks.1*", 1, 8), ("*mlp.0", 2, 5), ("blocks.*", 3, 7)]
TABLES = {
    "double_blocks.0.img_attn.proj": ATTENTION,
    "final_layer.linear": FINAL,
    "blocks.12.mlp.0": MLP,
}


def winner(config, base):
    """The pattern that decides about a layer, through the compiled list."""
    return next(
        (ranked.entry for ranked in config.ranked([base]) if matches(ranked.match, base)), None
    )


@pytest.mark.parametrize(("base", "table"), TABLES.items(), ids=TABLES)
def test_the_documented_patterns_rank_as_documented(base, table):
    for pattern, *measures in table:
        assert list(specificity(pattern, base)[: len(measures)]) == measures, pattern
    patterns = [row[0] for row in table]
    for index in range(len(patterns)):
        config = parse_layer_config(dict.fromkeys(patterns[index:], FP8))
        assert [ranked.entry.pattern for ranked in config.ranked([base])] == patterns[index:]
        assert winner(config, base).pattern == patterns[index]


def test_equal_patterns_are_decided_by_exclusion_then_by_position():
    tie = ["double_blocks.0.*", "*.0.img_attn.proj"]
    for first, second in (tie, tie[::-1]):
        config = parse_layer_config({first: FP8, second: FP8})
        assert winner(config, "double_blocks.0.img_attn.proj").pattern == first
    config = parse_layer_config({tie[0]: FP8, "_exclusions": [tie[1]]})
    assert winner(config, "double_blocks.0.img_attn.proj").exclusion


NAMES = st.sampled_from(
    [
        "blocks.12.mlp.0",
        "double_blocks.0.img_attn.proj",
        "final_layer.linear",
        "a.0",
        "x[0]",
        "norm",
    ]
)


@st.composite
def pattern_of(draw, base):
    """A glob that matches this name: some characters become wildcards, some stretches `*`."""
    parts = []
    index = 0
    while index < len(base):
        kind = draw(st.sampled_from(["keep"] * 6 + ["?", "class", "*"]))
        if kind == "*":
            index += draw(st.integers(0, len(base) - index))
            parts.append("*")
            continue
        char = base[index]
        plain = char not in "[]*?"
        parts.append(
            {"keep": char if plain else "?", "?": "?", "class": f"[{char}]" if plain else "?"}[kind]
        )
        index += 1
    return "".join(parts) or "*"


@st.composite
def config_for_a_name(draw):
    base = draw(NAMES)
    patterns = draw(
        st.lists(
            st.one_of(pattern_of(base), NAMES, st.just(base)), min_size=1, max_size=7, unique=True
        )
    )
    excluded = draw(st.lists(pattern_of(base), max_size=2, unique=True))
    return base, patterns, excluded


def table_of(patterns, excluded):
    return {**dict.fromkeys(patterns, FP8), **({"_exclusions": excluded} if excluded else {})}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(config_for_a_name(), st.randoms(use_true_random=False))
def test_the_ranking_is_total_documented_and_independent_of_the_order_of_keys(
    case, dice: random.Random
):
    base, patterns, excluded = case

    def key(entry):
        rank, literal, wildcards = specificity(entry.pattern, base)
        return rank, -literal, wildcards, not entry.exclusion

    config = parse_layer_config(table_of(patterns, excluded))
    hits = [
        entry for entry in config.entries if entry.pattern == base or matches(entry.pattern, base)
    ]
    if not hits:
        assert winner(config, base) is None
        return
    keys = [(*key(entry), entry.position) for entry in hits]
    assert len(set(keys)) == len(keys)
    chosen = winner(config, base)
    assert (*key(chosen), chosen.position) == min(keys)
    if base in patterns or base in excluded:
        assert chosen.pattern == base
    shuffled = list(patterns)
    dice.shuffle(shuffled)
    again = winner(parse_layer_config(table_of(shuffled, excluded[::-1])), base)
    assert key(again) == key(chosen)


@st.composite
def regex_of(draw, base):
    """A regular expression that matches this whole name."""
    parts, index = [], 0
    while index < len(base):
        kind = draw(st.sampled_from(["keep"] * 6 + [".", "class", "digit", ".*"]))
        char = base[index]
        if kind == ".*":
            index += draw(st.integers(0, len(base) - index))
            parts.append(".*")
            continue
        wild = {
            ".": ".",
            "class": f"[{re.escape(char)}]",
            "digit": r"\d" if char.isdigit() else r"\S",
        }
        parts.append(wild.get(kind, re.escape(char)))
        index += 1
    return "".join(parts) or ".*"


@st.composite
def config_for_a_model(draw, fullmatch):
    made = regex_of if fullmatch else pattern_of
    bases = st.sampled_from(sorted(MODEL))
    patterns = draw(
        st.lists(st.one_of(bases.flatmap(made), bases), min_size=1, max_size=8, unique=True)
    )
    return patterns, draw(st.lists(bases.flatmap(made), max_size=2, unique=True))


MODEL = {
    "blocks.12.mlp.0",
    "blocks.1.mlp.0",
    "double_blocks.0.img_attn.proj",
    "final_layer.linear",
    "a.0",
    "norm",
}


@pytest.mark.slow
@pytest.mark.parametrize("fullmatch", [False, True], ids=["globs", "regular expressions"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_in_a_whole_model_the_most_specific_pattern_decides_every_layer_whatever_the_order(
    fullmatch, data
):
    """One list for all layers gives each of them the pattern that wins among those that match it."""
    patterns, excluded = data.draw(config_for_a_model(fullmatch))
    shuffled = data.draw(st.permutations(patterns))
    configs = [
        parse_layer_config(table_of(order, excluded), fullmatch=fullmatch)
        for order in (patterns, shuffled)
    ]
    for base in MODEL:
        winners = []
        for config in configs:
            hits = [
                entry
                for entry in config.entries
                if matches(f"re:{entry.pattern}" if fullmatch else entry.pattern, base)
            ]
            ranked = [
                (*ranking(entry.pattern, base, fullmatch), not entry.exclusion, entry.position)
                for entry in hits
            ]
            wanted = hits[ranked.index(min(ranked))] if hits else None
            found = next((r.entry for r in config.ranked(MODEL) if matches(r.match, base)), None)
            assert found == wanted
            winners.append(found and (ranking(found.pattern, base, fullmatch), found.exclusion))
        assert winners[0] == winners[1]
        if base in patterns:
            assert (
                next(r.entry.pattern for r in configs[0].ranked(MODEL) if matches(r.match, base))
                == base
            )


def ranking(pattern, base, fullmatch):
    """(rank, longer literal text first, fewer wildcards first) as the format page orders them."""
    rank, literal, wildcards = specificity(pattern, base, fullmatch=fullmatch)
    return rank, -literal, wildcards


@pytest.mark.parametrize(
    ("pattern", "measures"),
    [
        (r"double_blocks\.\d+\.img_attn\.proj", (1, 28, 1)),
        (r".*attn.*", (2, 4, 2)),
        (r"^final_layer\.(linear|adaLN)$", (3, 23, 0)),
        (r"(?:a|b){2}c+", (3, 3, 2)),
        (r".*", (4, 0, 1)),
        (r"blocks\.[0-9]{1,2}\.mlp", (1, 11, 1)),
    ],
)
def test_literal_length_of_regular_expressions(pattern, measures):
    assert pattern_rank(pattern, fullmatch=True) == measures


def test_fullmatch_reads_keys_as_whole_regular_expressions():
    config = parse_layer_config(
        {r"blocks\.\d+\.mlp": FP8, "blocks.0.mlp": {"skip": True}}, fullmatch=True
    )
    assert winner(config, "blocks.12.mlp").wish is not None
    assert winner(config, "blocks.12.mlp.0") is None
    assert winner(config, "blocks.0.mlp").pattern == "blocks.0.mlp"


def test_a_key_with_wildcard_characters_names_the_layer_it_equals():
    config = parse_layer_config({"a[0].b": FP8, "a*": {"skip": True}})
    assert winner(config, "a[0].b").wish is not None
    assert winner(config, "a0.b").pattern == "a[0].b"  # and is a glob for all others
    assert winner(config, "a1.b").pattern == "a*"


BAD = {
    "not an object": ([], "layer-config must be a JSON object, got list"),
    "entry": ({"K": "fp8"}, "layer-config entry 'K' must be an object, got str"),
    "unknown setting": (
        {"K": {**FP8, "bloc_size": 64}},
        "layer-config entry 'K': unknown key 'bloc_size', did you mean 'block_size'?",
    ),
    "no format": (
        {"K": {}},
        "layer-config entry 'K': 'format' is required (or set \"skip\": true)",
    ),
    "empty format": (
        {"_default": {"format": ""}},
        "layer-config entry '_default': 'format' is empty; fill it in, set \"skip\": true, or delete the entry",
    ),
    "unknown format": (
        {"K": {"format": "float8_e4m3"}},
        "layer-config entry 'K': unknown format 'float8_e4m3', did you mean 'float8_e4m3fn'? Allowed: ",
    ),
    "alias": (
        {"K": {"format": "fp8_scaled"}},
        "unknown format 'fp8_scaled', did you mean 'float8_e4m3fn'?",
    ),
    "block_wise": (
        {"K": {"format": "float8_e4m3fn_block_wise"}},
        "did you mean 'float8_e4m3fn_blockwise'?",
    ),
    "read only": ({"K": {"format": "hybrid_mxfp8"}}, "can be read but not written; use mxfp8"),
    "read only 4 bit": ({"K": {"format": "bnb_af4"}}, "can be read but not written; use bnb_nf4"),
    "text for a number": (
        {"K": {"format": "int8_blockwise", "block_size": "64"}},
        "layer-config entry 'K': 'block_size' must be one of 16, 32, 64, 128, 256, got '64' (str)",
    ),
    "bool for a number": (
        {"K": {"format": "int8_blockwise", "block_size": True}},
        "'block_size' must be one of 16, 32, 64, 128, 256, got True (bool)",
    ),
    "size not offered": (
        {"K": {"format": "int8_blockwise", "group_size": 48}},
        "'group_size' must be one of 16, 32, 64, 128, 256, got 48 (int)",
    ),
    "skip is no bool": ({"K": {"skip": "yes"}}, "'skip' must be true or false, got 'yes' (str)"),
    "method": ({"K": {**FP8, "method": "gtpq"}}, "'method' must be one of "),
    "mode": (
        {"K": {**FP8, "scaling_mode": "rows"}},
        "must be one of tensor, row, block2d, block, block3d, got 'rows' (str)",
    ),
    "contradiction": (
        {"x": {**FP8, "scaling_mode": "row"}},
        "entry 'x': format float8_e4m3fn stores one scale; for scaling_mode row use float8_e4m3fn_rowwise",
    ),
    "mode of a format without": (
        {"x": {"format": "nvfp4", "scaling_mode": "row"}},
        "format nvfp4 takes no scaling_mode",
    ),
    "rotated with one scale": (
        {"x": {"format": "int8_tensorwise", "convrot": True, "scaling_mode": "tensor"}},
        "convrot needs scaling row; got tensor",
    ),
    "simple and method": (
        {"x": {**FP8, "simple": True, "method": "svd"}},
        "simple is true, which means method nearest",
    ),
    "default": ({"_default": []}, "layer-config: '_default' must be an object, got list"),
    "exclusions": (
        {"_exclusions": "norm"},
        "layer-config: '_exclusions' must be a list of strings",
    ),
    "near miss default": (
        {"_defaults": {}},
        "layer-config: unknown key '_defaults', did you mean '_default'?",
    ),
    "near miss exclusions": (
        {"_exclusion": []},
        "unknown key '_exclusion', did you mean '_exclusions'?",
    ),
}


@pytest.mark.parametrize(("table", "message"), BAD.values(), ids=BAD)
def test_a_malformed_config_is_refused_in_documented_words(table, message):
    with pytest.raises(LayerConfigError) as refused:
        parse_layer_config_text(json.dumps(table), "c.json")
    assert any(message in problem for problem in refused.value.problems), refused.value.problems


def test_all_problems_are_collected():
    table = {
        name: entry
        for bad, _ in BAD.values()
        if isinstance(bad, dict)
        for name, entry in bad.items()
        if name == "K"
    }
    table |= {"a": {}, "b": {"format": "fp9"}, "c": 3, "_exclusions": [1]}
    with pytest.raises(LayerConfigError) as refused:
        parse_layer_config(table)
    assert len(refused.value.problems) == 5
    assert str(refused.value) == "; ".join(refused.value.problems)


def test_many_empty_formats_are_named_five_at_a_time():
    with pytest.raises(LayerConfigError) as refused:
        parse_layer_config({f"layer{i}": {"format": "", "_shape": [4, 4]} for i in range(9)})
    assert len(refused.value.problems) == 6
    assert refused.value.problems[-1] == "layer-config: 4 more entries with an empty 'format'"


def test_files_that_are_no_json_say_where(tmp_path):
    path = tmp_path / "c.json"
    with pytest.raises(RecipeError, match="layer-config not found: .*c.json"):
        load_layer_config(path)
    path.write_text('{\n  "a": ,\n}')
    with pytest.raises(RecipeError, match="c.json line 2 column 8: "):
        load_layer_config(path)
    path.write_text('{"a": {"format": "float8_e4m3fn"}, "a": {"skip": true}}')
    with pytest.raises(RecipeError, match="layer-config: key 'a' appears twice"):
        load_layer_config(path)
    path.write_text(json.dumps({"(": FP8}))
    with pytest.raises(
        RecipeError, match=r"layer-config entry '\(' is not a regular expression: missing \)"
    ):
        load_layer_config(path, fullmatch=True)
    assert load_layer_config(path).entries[0].pattern == "("


@pytest.mark.parametrize(
    ("settings_", "wish"),
    [
        ({"format": "float8_e4m3fn_blockwise", "block_size": 128}, "float8_e4m3fn_blockwise:block_size=128"),
        ({"format": "float8_e4m3fn_block3d", "scaling_mode": "block", "group_size": 32}, "float8_e4m3fn_block3d:block_size=32"),
        ({"format": "int8_tensorwise", "scaling_mode": "tensor"}, "int8_tensorwise:scaling=tensor"),
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
         "int8_tensorwise:convrot=true,convrot_groupsize=64"),
        ({"format": "int8_blockwise", "scaling_mode": "block"}, "int8_blockwise"),
        ({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, "float8_e4m3fn:full_precision_matrix_mult=true"),
        ({"format": "convrot_w4a4", "linear_dtype": "int8"}, "convrot_w4a4:linear_dtype=int8"),
        ({"format": "bnb_nf4", "simple": True, "_comment": "why"}, "bnb_nf4"),
        ({"format": "bnb_nf4", "block_size": 128, "method": "nearest"}, "bnb_nf4:block_size=128"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_settings_become_the_wish_they_describe(settings_, wish):
    (entry,) = parse_layer_config({"x": settings_}).entries
    assert entry.wish == parse_wish(wish)


def test_what_an_entry_leaves_unsaid_comes_from_the_primary():
    primary = replace(parse_wish("int8_tensorwise:full_precision_matrix_mult=true"))
    config = parse_layer_config(
        {"a": FP8, "b": {**FP8, "full_precision_matrix_mult": False}}, unstated=primary
    )
    assert [entry.wish.options.full_precision_matrix_mult for entry in config.entries] == [
        True,
        False,
    ]


def plan_of(config, **recipe):
    header = Header(
        {name: TensorSpec(name, "BF16", shape) for name, shape in flux_shapes(256).items()}
    )
    return make_plan(
        header,
        Recipe(parse_wish("int8_tensorwise"), layer_config=parse_layer_config(config), **recipe),
    )


def test_layer_config_beats_rules_presets_and_primary_and_the_plan_names_the_pattern():
    config = {
        "img_in": FP8,
        "double_blocks.*": {"format": "int8_blockwise"},
        "_exclusions": ["*txt_mod*"],
    }
    plan = plan_of(
        config,
        rules=(Rule("double_blocks.0.img_mod.lin", None), Rule("txt_in", parse_wish("bnb_nf4"))),
    )
    rows = {layer.name: layer for layer in plan.layers}
    assert (rows["img_in"].format, rows["img_in"].rule) == (
        "float8_e4m3fn",
        "layer-config 'img_in'",
    )
    assert rows["double_blocks.0.img_mod.lin"].format == "int8_blockwise"
    assert rows["double_blocks.0.txt_mod.lin"].reason == "layer-config _exclusions '*txt_mod*'"
    assert rows["txt_in"].rule == "rule 'txt_in'"
    assert rows["time_in.in_layer"].rule == "preset flux 'time_in.*'"
    assert rows["single_blocks.0.linear1"].rule == "primary"
    assert (
        "rule 'double_blocks.0.img_mod.lin' never decides: rules before it match the same layers"
        in plan.warnings
    )


def test_a_default_closes_the_list_and_says_how_many_layers_the_preset_would_have_kept():
    plan = plan_of({"_default": FP8, "single_blocks.*": {"skip": True}})
    rows = {
        layer.name: layer
        for layer in plan.layers
        if layer.is_layer and len(layer.inputs[0].shape) == 2
    }
    assert rows["final_layer.linear"].rule == "layer-config _default"
    assert rows["single_blocks.0.linear1"].action == "keep"
    assert not any(row.rule.startswith(("preset", "primary")) for row in rows.values())
    assert any("10 layers that the preset would keep are quantized because of the layer-config's _default" in w
               for w in plan.warnings)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"nothing*": FP8}, "layer-config 'nothing*' matched nothing"),
        ({r"double_blocks\.\d+": FP8}, r"layer-config 'double_blocks\.\d+' matched nothing; for regular expressions ask for fullmatch"),
        ({"*query_norm": FP8}, "layer-config '*query_norm' matches only tensors that cannot be quantized"),
        ({"img_in": FP8, "img_i*": FP8}, "layer-config 'img_i*' never decides: rules before it match the same layers"),
        ({"img_in": {**FP8, "block_size": 64}}, "layer-config entry 'img_in': 'block_size' does not apply to float8_e4m3fn and is ignored"),
        ({"img_in": {**FP8, "convrot": True}}, "layer-config entry 'img_in': 'convrot' does not apply to float8_e4m3fn and is ignored"),
        ({"img_in": {**FP8, "skip": True}}, "layer-config entry 'img_in': skip is true, so format is ignored"),
    ],
    ids=["nothing", "regex", "norms", "never wins", "block size", "convrot", "skip"],
)  # fmt: skip
def test_what_has_no_effect_is_a_warning(config, warning):
    plan = plan_of(config)
    assert warning in plan.warnings
    assert ("matched nothing" in warning) == bool(plan.unmatched)


def test_entries_that_say_the_same_are_read_once(monkeypatch):
    """4,000 entries took 1.4 s."""
    built = []
    build = layer_config._Reader._build
    monkeypatch.setattr(
        layer_config._Reader, "_build", lambda *given: built.append(given) or build(*given)
    )
    entry = {"format": "bnb_nf4", "block_size": 64}
    found = parse_layer_config({f"blocks.{i}": dict(entry) for i in range(4000)})
    assert len(built) == 1 and len({entry.wish for entry in found.entries}) == 1


def test_settings_that_python_takes_for_equal_are_told_apart():
    entries = {
        "a": {"format": "int8_tensorwise", "convrot": True},
        "b": {"format": "int8_tensorwise", "convrot": 1},
    }
    with pytest.raises(LayerConfigError, match="'b': .*convrot must be bool, got 1"):
        parse_layer_config(entries)


def test_an_error_of_a_thousand_problems_can_be_read():
    entries = {f"blocks.{i}": {"format": f"int9_{i}"} for i in range(1000)}
    with pytest.raises(LayerConfigError) as refused:
        parse_layer_config(entries)
    assert len(refused.value.problems) == 1000
    assert len(str(refused.value)) < 17_000 and "characters more" in str(refused.value)
