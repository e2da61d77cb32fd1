"""What the documentation shows is real: recipes parse, layer-configs are valid, commands mean what stands beside them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits import Recipe, inspect_file, quantize_file
from fewbits.quant_ops.compat.command import parse
from fewbits.quant_ops.compat.flags import FLAGS
from fewbits.quant_ops.compat.job import make_job
from fewbits.quant_ops.errors import QuantError
from fewbits.quant_ops.formats import FORMATS, own_methods
from fewbits.quant_ops.methods import METHODS
from fewbits.quant_ops.planning.layer_config import parse_layer_config
from fewbits.quant_ops.planning.model_family import families
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import draft_from_text, parse_wish, recipe_from_table
from fewbits.quant_ops.spec import Header, TensorSpec
from support.helpers import EMOJI, flux_shapes

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "web" / "docs").rglob("*.md")),
]
CLASSIC = (ROOT / "docs" / "convert_to_quant.md").read_text(encoding="utf-8")


def blocks(language):
    """(page, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [
            (page, match) for match in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
        ]
    return [
        pytest.param(page, text, id=f"{page.relative_to(ROOT)}-{i}")
        for i, (page, text) in enumerate(found)
    ]


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_every_recipe_shown_can_be_pasted(page, text):
    assert draft_from_text(text, page.name).finish().primary.format == "int8_tensorwise"


def test_the_layer_config_shown_is_valid_and_ranked_as_the_page_says():
    text = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)
    config = parse_layer_config(json.loads(shown))
    assert not config.warnings and len(config.entries) == 4
    ranked = [entry.entry.pattern for entry in config.ranked(["final_layer.linear", "img_in"])]
    assert set(ranked[:2]) == {"final_layer.linear", "img_in"} and ranked[2:] == [
        "double_blocks.0.*",
        "*norm*",
    ]


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_every_script_shown_runs(page, text, tmp_path, monkeypatch, capsys):
    shutil.copy(EMOJI, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    text = text.replace("fewbits.compat", "fewbits.quant_ops.compat")  # a name of installed copies
    exec(compile(text, page.name, "exec"), {"weight": torch.randn(64, 64)})
    assert (tmp_path / "small.safetensors").stat().st_size < EMOJI.stat().st_size


ODD = {
    "blocks.0.embed_tokens.weight": ("BF16", (64, 64)),
    "blocks.0.conv.weight": ("BF16", (16, 16, 3, 3)),
    "blocks.0.small.weight": ("BF16", (8, 64)),
    "blocks.0.ids.weight": ("I64", (64, 64)),
    "blocks.0.cast.weight": ("F8_E4M3", (64, 64)),
    "blocks.0.wide.weight": ("BF16", (64, 64)),
    "blocks.0.named.weight": ("BF16", (64, 64)),
    "x.cond_seq_linear.weight": ("BF16", (64, 64)),
}
PLANS = {
    "flux": (flux_shapes(), {}),
    "unknown": (ODD, {"rule": [{"match": "*.named", "keep": True}]}),
    "layer-config": (ODD, {"layer_config": {"*.wide": {"skip": True}}}),
    "heuristics": (ODD, {"heuristics": True}),
    "checkpoint": (
        {f"model.diffusion_model.{name}": shape for name, shape in flux_shapes().items()}
        | {"first_stage_model.decoder.weight": (64, 64)},
        {},
    ),
}


def as_pattern(shown):
    """A reason as the page shows it: `...` and whatever stands in brackets is any text."""
    dots = re.escape(shown).replace(r"\.\.\.", ".*")
    return re.sub(r"\\\([^)]*\\\)", ".*", dots)


@pytest.mark.parametrize("case", PLANS)
def test_every_reason_to_keep_a_layer_is_explained(case):
    shapes, wishes = PLANS[case]
    specs = {
        name: TensorSpec(name, *(found if isinstance(found[0], str) else ("BF16", found)))
        for name, found in shapes.items()
    }
    recipe = recipe_from_table({"primary": {"format": "bnb_nf4"}, **wishes})
    kept = {
        layer.name: layer.reason
        for layer in make_plan(Header(specs), recipe).layers
        if layer.action == "keep"
    }
    rules = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    table = rules.split("## Why was this layer kept")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \| ", table, re.M)
    known = [as_pattern(text) for text in re.findall(r"`([^`]+)`", " ".join(rows))]
    assert len(kept) > 3
    unexplained = {
        name: reason
        for name, reason in kept.items()
        if not any(re.fullmatch(pattern, reason) for pattern in known)
    }
    assert unexplained == {}


COMMANDS = [line for line in CLASSIC.splitlines() if line.strip().startswith("convert_to_quant -i")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_classic_command_shown_is_accepted(line, tmp_path):
    words = shlex.split(line)[1:]
    if "--layer-config" in words:
        (tmp_path / "c.json").write_text('{"a": {"format": "bnb_nf4"}}')
        words[words.index("--layer-config") + 1] = str(tmp_path / "c.json")
    assert make_job(parse(words)).arguments


@pytest.mark.parametrize(
    ("flags", "format"),
    [
        ("", "float8_e4m3fn"), ("--scaling_mode tensor", "float8_e4m3fn"), ("--scaling_mode row", "float8_e4m3fn_rowwise"),
        ("--scaling_mode block", "float8_e4m3fn_block3d"), ("--scaling_mode block2d", "float8_e4m3fn_blockwise"),
        ("--int8", "int8_tensorwise"), ("--int8 --scaling_mode row", "int8_tensorwise"),
        ("--int8 --scaling_mode block2d", "int8_blockwise"), ("--int8 --block_size 128", "int8_blockwise"),
        ("--int8 --kernel_backend lodewise", "int8_lodewise"), ("--nf4", "bnb_nf4"), ("--fp4", "bnb_fp4"),
        ("--nvfp4", "nvfp4"), ("--mxfp8", "mxfp8"), ("--convrot", "int8_tensorwise"),
    ],
)  # fmt: skip
def test_the_table_of_formats_is_what_the_flags_do(flags, format):
    assert make_job(parse(["-i", "m", *flags.split()])).recipe.primary.format == format


def test_flags_and_methods_named_on_the_pages_exist():
    spellings = {spelling for flag in FLAGS for spelling in flag.spellings}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", CLASSIC))
    assert named <= spellings
    rules = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    table = rules.split("| method | does |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) <= set(METHODS)


def test_the_formats_own_methods_exist_and_are_those_the_page_names():
    assert {format.method for format in FORMATS.values()} <= set(METHODS)
    rules = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    assert f"means the format's own: {own_methods()}." in rules.replace("`", "")


def quantize(source, target, format="int8_tensorwise"):
    quantize_file(source, target, Recipe(parse_wish(format)))


def truncated(folder):
    (folder / "cut.safetensors").write_bytes(EMOJI.read_bytes()[:5_000_000])
    inspect_file(folder / "cut.safetensors")


def not_a_number(folder):
    save_file({"a.weight": torch.full((32, 32), torch.nan)}, folder / "nan.safetensors")
    quantize(folder / "nan.safetensors", folder / "out.safetensors")


def twice(folder):
    quantize(EMOJI, folder / "once.safetensors")
    quantize(folder / "once.safetensors", folder / "twice.safetensors", "bnb_nf4")


def existing(folder):
    (folder / "out.safetensors").touch()
    quantize(EMOJI, folder / "out.safetensors")


def no_model(folder):
    names = ("decoder.conv_in.weight", "encoder.conv_in.weight")
    save_file({name: torch.ones(32, 32, 3, 3) for name in names}, folder / "vae.safetensors")
    quantize(folder / "vae.safetensors", folder / "out.safetensors")


REFUSALS = {
    "unknown format": lambda folder: parse_wish("fp8_scaled"),
    "tensor '": not_a_number,
    "layer '": twice,
    "exists already": existing,
    "truncated": truncated,
    "this is a": no_model,
}


@pytest.mark.parametrize("start", REFUSALS)
def test_the_readme_shows_messages_as_they_are(start, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Troubleshooting")[1].split("\n## ")[0]
    shown = next(
        text for text in re.findall(r"^\| `([^`]+)`", table, re.M) if text.startswith(start)
    )
    with pytest.raises(QuantError) as refused:
        REFUSALS[start](tmp_path)
    assert re.search(as_pattern(shown), str(refused.value))


def test_the_families_named_in_the_readme_are_recognised():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"high precision is known for (.*?), their text encoders", readme, re.S)
    titles = {family.title for family in families() if family.kind != "refuse"}
    assert {name.strip() for name in re.split(r",\s*", named)} <= titles
