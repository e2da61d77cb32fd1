"""`fewbits plan --template`, `--layer-config` and `--heur`: written from headers, refused unedited, shown in the plan."""

import json

import pytest

from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.planning.template import template_path
from support.helpers import flux_shapes, tiny_checkpoint


@pytest.fixture
def model(tmp_path):
    return tiny_checkpoint(
        tmp_path / "m.x.safetensors",
        {**flux_shapes(), "conv.weight": (32, 32, 3, 3), "thin.weight": (8, 64)},
    )


def test_the_template_lists_every_candidate_in_file_order_with_its_shape(model, capsys):
    assert main(["plan", str(model), "--template"]) == 0
    path = model.with_name("m.x_layer_config_template.json")
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text()
    table = json.loads(text)
    assert text == json.dumps(table, indent=2) + "\n"
    assert list(table)[:2] == ["_default", "_exclusions"]
    assert table["_default"] == {"format": ""} and table["_exclusions"] == []
    assert table["double_blocks.0.img_attn.qkv"] == {"format": "", "_shape": [384, 128]}
    size = int.from_bytes(model.read_bytes()[:8], "little")
    header = json.loads(model.read_bytes()[8 : 8 + size])
    weights = [name.removesuffix(".weight") for name in header if name.endswith(".weight")]
    candidates = [
        n for n in weights if len(s := header[f"{n}.weight"]["shape"]) == 2 and min(s) >= 16
    ]
    assert list(table)[2:] == candidates and "thin" not in table and "conv" not in table


def test_an_existing_template_is_kept_without_overwrite(model, capsys):
    path = model.with_name("m.x_layer_config_template.json")
    path.write_text("mine")
    assert main(["plan", str(model), "--template"]) == 2
    assert (
        f"{path} exists already; allow overwriting to replace it (--overwrite)"
        in capsys.readouterr().err
    )
    assert path.read_text() == "mine"
    assert main(["plan", str(model), "--template", "--overwrite"]) == 0
    assert json.loads(path.read_text())["_default"] == {"format": ""}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/m.safetensors", "a/m_layer_config_template.json"),
        ("a/m.safetensors.index.json", "a/m.safetensors.index_layer_config_template.json"),
        ("a/folder", "a/folder_layer_config_template.json"),
        ("a/folder/", "a/folder_layer_config_template.json"),
    ],
)
def test_the_templates_name_is_the_input_without_its_last_extension(source, name):
    assert template_path(source).as_posix() == name


def test_an_unedited_template_is_refused_with_the_way_out(model, tmp_path, capsys):
    main(["plan", str(model), "--template"])
    template = model.with_name("m.x_layer_config_template.json")
    out = tmp_path / "q.safetensors"
    arguments = [
        "quantize",
        str(model),
        "-o",
        str(out),
        "--format",
        "int8_tensorwise",
        "--layer-config",
        str(template),
    ]
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert (
        "layer-config entry '_default': 'format' is empty; fill it in, set \"skip\": true, or delete the entry"
        in shown
    )
    assert "more entries with an empty 'format'" in shown and shown.count("\n") == 1
    assert not out.exists()


def test_layer_config_and_heuristics_show_in_the_plan(model, tmp_path, capsys):
    config = tmp_path / "c.json"
    config.write_text(
        json.dumps({"img_in": {"format": "float8_e4m3fn"}, "nothing": {"skip": True}})
    )
    assert (
        main(
            [
                "plan",
                str(model),
                "--format",
                "int8_tensorwise",
                "--layer-config",
                str(config),
                "--heur",
                "--json",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    plan = json.loads(shown.out)
    rows = {row["name"]: row for row in plan["layers"]}
    assert (rows["img_in"]["format"], rows["img_in"]["rule"]) == (
        "float8_e4m3fn",
        "layer-config 'img_in'",
    )
    assert rows["double_blocks.0.img_attn.qkv"]["reason"].startswith("heuristics: ")
    assert plan["unmatched"] == ["nothing"]
    assert "warning: layer-config 'nothing' matched nothing\n" in shown.err
    assert [rule["rule"] for rule in plan["rules"]][-2:] == ["heuristics", "primary"]
    main(["plan", str(model), "--format", "int8_tensorwise", "--layer-config", str(config)])
    text = capsys.readouterr().out
    assert "rules, in order; the first that matches a layer decides" in text
    assert "     0 / 0      keep      layer-config 'nothing'  (matched nothing)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fullmatch"], "--fullmatch is about the keys of --layer-config FILE, which is missing"),
        (["--layer-config", "none.json"], "layer-config not found: none.json"),
    ],
)
def test_a_layer_config_that_is_not_there_is_refused(model, arguments, message, capsys):
    assert main(["plan", str(model), "--format", "int8_tensorwise", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_with_a_layer_config_takes_no_second_one(model, tmp_path, capsys):
    recipe, config = tmp_path / "r.toml", tmp_path / "c.json"
    recipe.write_text(
        '[primary]\nformat = "bnb_nf4"\n[layer_config]\nimg_in = { format = "float8_e4m3fn" }\n'
    )
    config.write_text("{}")
    assert main(["plan", str(model), "--recipe", str(recipe), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    assert rows["img_in"]["format"] == "float8_e4m3fn"
    assert main(["plan", str(model), "--recipe", str(recipe), "--layer-config", str(config)]) == 2
    assert "the recipe has a [layer_config] of its own" in capsys.readouterr().err
