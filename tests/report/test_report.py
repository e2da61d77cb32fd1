"""The report of a conversion: what it measures, what it says, and the file beside the model."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewbits.quant_ops.checkpoint import second_reading
from fewbits.quant_ops.checkpoint.metadata import header_markers
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.part import PartFile
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.report import plots
from fewbits.quant_ops.report.file import read_report, report_path, report_text
from fewbits.quant_ops.report.layer import saturated
from fewbits.quant_ops.report.markdown import to_markdown
from fewbits.quant_ops.report.words import MEASURED, in_words
from fewbits.quant_ops.spec import LayerPlan, TensorSpec
from support.harness import readme
from support.helpers import fewbits, tiny_checkpoint


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny_checkpoint(tmp_path / "model.safetensors")


def converted(model: Path, wish: str = "int8_tensorwise:convrot=false", **how: object):
    target = model.with_name("small.safetensors")
    return quantize_file(model, target, Recipe(parse_wish(wish)), overwrite=True, **how), target


def test_the_numbers_are_those_that_numpy_finds_in_the_file(model):
    report, target = converted(model)
    weights, stored = load_file(model), load_file(target)
    for result in report.results:
        w = weights[f"{result.name}.weight"].double().numpy()
        codes = stored[f"{result.name}.weight"].double().numpy()
        d = codes * stored[f"{result.name}.weight_scale"].double().numpy().reshape(-1, 1)
        row = result.to_json()
        assert row["rel_l2"] == pytest.approx(np.linalg.norm(d - w) / np.linalg.norm(w), rel=1e-4)
        cosine = (d * w).sum() / np.linalg.norm(d) / np.linalg.norm(w)
        assert 1 - row["cosine"] == pytest.approx(1 - cosine, rel=1e-3, abs=1e-9)
        assert row["largest_error"] == pytest.approx(np.abs(d - w).max(), rel=1e-5)
        assert row["saturated"] == np.mean(np.abs(codes) == 127)
        assert row["sqnr_db"] == pytest.approx(-20 * math.log10(row["rel_l2"]))


def test_totals_by_format_are_those_of_its_layers(model):
    data = converted(model)[0].to_json()
    (row,) = [row for row in data["summary"] if row["format"] == "int8_tensorwise"]
    assert row["rel_l2"] == pytest.approx(data["rel_l2"])
    assert [row["rel_l2"] for row in data["summary"] if row["format"] == "keep"] == [None]


def test_codes_at_the_ends_are_counted_by_their_bytes():
    codes = torch.tensor([[127, -127, 126], [-128, 0, 127]], dtype=torch.int8)
    assert saturated(codes, (127, 129)) == 3
    assert saturated(codes[:, :2], (127, 129)) == 2


def test_a_report_lies_beside_the_file_without_paths(model):
    report, target = converted(model, sidecar=True)
    path = report_path(target)
    assert path.name == "small.fewbits.json"
    data = read_report(path)
    assert data["file"] == "small.safetensors" and data["source"] == "model.safetensors"
    assert len(data["layers"]) == len(report.to_json()["layers"])
    assert str(model.parent) not in path.read_text(encoding="utf-8")


def test_without_the_wish_nothing_lies_beside_the_file(model):
    _, target = converted(model)
    assert sorted(path.name for path in model.parent.iterdir()) == [
        "model.safetensors",
        "small.safetensors",
    ]
    assert fewbits("quantize", model, "-o", target, "--format", "int8", "--overwrite",
                   "--no-report").returncode == 0  # fmt: skip
    assert not report_path(target).exists()


def test_the_command_writes_one_and_replaces_its_own(model):
    target = model.with_name("small.safetensors")
    for _ in range(2):
        done = fewbits("quantize", model, "-o", target, "--format", "int8", "--overwrite")
        assert done.returncode == 0, done.stderr
    assert read_report(report_path(target))["fewbits"]


@pytest.mark.parametrize("door", ["quantize", "convert"])
def test_a_model_that_is_replaced_takes_its_report_with_it(model, door, monkeypatch):
    """Killed right after the model was replaced: no report is left, least of all the old one's."""
    _, target = converted(model, sidecar=True)
    monkeypatch.setattr(PartFile, "publish", lambda part: pytest.fail("killed", pytrace=False))
    words = {"quantize": ["--format", "nf4"], "convert": ["--to", "bf16"]}[door]
    with pytest.raises(pytest.fail.Exception, match="killed"):
        fewbits(door, model, "-o", target, "--overwrite", *words)
    assert not report_path(target).exists()


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"kind": "conversion"}', "\u4e00"])
def test_a_file_of_somebody_else_stays_and_the_model_is_written(model, text):
    foreign = model.with_name("small.fewbits.json")
    foreign.write_text(text, encoding="utf-8")
    report, target = converted(model, sidecar=True)
    assert foreign.read_text(encoding="utf-8") == text
    assert "small.fewbits.json exists and is not a report" in report.plan.warnings[-1]
    assert target.exists()


def test_a_link_is_not_followed(model):
    victim = model.with_name("precious.json")
    victim.write_text("{}", encoding="utf-8")
    link = model.with_name("small.fewbits.json")
    link.symlink_to(victim)
    converted(model, sidecar=True)
    assert victim.read_text(encoding="utf-8") == "{}" and link.is_symlink()


def test_thousands_of_layers_stay_under_five_megabytes(model):
    report, target = converted(model)
    (result, *_), (layer, *_) = report.results, [
        layer for layer in report.plan.layers if layer.format
    ]  # fmt: skip

    def named(index: int) -> tuple[LayerPlan, object]:
        name = f"model.diffusion_model.transformer_blocks.{index}.feed_forward.net.2.proj_out"
        spec = TensorSpec(f"{name}.weight", "BF16", (12288, 3072))
        return replace(layer, name=name, inputs=(spec,)), replace(result, name=name)

    layers, results = zip(*map(named, range(6000)), strict=True)
    large = replace(report, plan=replace(report.plan, layers=layers), results=results)
    text = report_text(large, target, "model.safetensors")
    assert len(text) < 5e6
    assert len(json.loads(text)["layers"]) == 6000
    assert len(to_markdown(json.loads(text))) < 10_000


def test_markdown_shows_the_worst_layers_first(model):
    report, target = converted(model)
    text = to_markdown(json.loads(report_text(report, target, model.name)))
    worst = max(report.results, key=lambda result: result.rel_l2)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0].startswith(f"| `{worst.name}` | int8_tensorwise | {worst.rel_l2:.4f} |")
    assert in_words(report.rel_l2()) in text


def test_the_words_rest_on_the_table_of_the_documentation():
    rows = [row for row in readme.table("formats")[1:] if "w4a4" not in row[0]]
    assert sorted(float(row[3]) for row in rows) == sorted(ssim for _, ssim in MEASURED)
    assert list(MEASURED) == sorted(MEASURED, key=lambda row: row[0])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (0.0, "no weight has changed"),
        (0.0001, "less error than any"),
        (0.0073, "hard to tell"),
        (0.037, "no error like this"),
        (0.09, "other details"),
        (0.12, "visibly different"),
        (0.5, "look at pictures"),
    ],
)
def test_errors_are_spoken_of_only_where_they_were_measured(error, said):
    assert said in in_words(error)


def test_of_many_experts_the_worst_in_each_block_is_drawn():
    rows = []
    for block, expert in itertools.product(range(3), range(40)):
        name = f"layers.{block}.moe.experts.{expert}.up"
        rows.append({"name": name, "rel_l2": 0.01 * (expert + 1) + block})
    found = plots._worst_of_kind(plots.placed(rows))
    assert [layer.name for layer in found] == [f"layers.{b}.moe.experts.39.up" for b in range(3)]
    assert {layer.kind for layer in found} == {"layers moe.experts.*.up"}


def test_two_layers_of_a_block_that_only_a_number_tells_apart_are_two_kinds():
    rows = [{"name": f"blocks.{b}.mlp.{n}", "rel_l2": 0.1} for b in range(2) for n in (0, 2)]
    found = plots.placed(rows)
    assert {layer.kind for layer in found} == {"blocks mlp.0", "blocks mlp.2"}
    assert len(plots._worst_of_kind(found)) == 4


def axes_of(draw):
    pytest.importorskip("matplotlib")
    figure, ink = plots._figure("light")
    axes = figure.add_subplot()
    plots._dressed(axes, "light", labels=plots.TEXT)
    draw(axes, ink)
    figure.draw_without_rendering()
    return axes


def test_a_single_layer_stands_at_a_whole_block_and_is_called_one():
    rows = [{"name": "blocks.7.linear", "format": "nvfp4", "rel_l2": 0.1}]
    axes = axes_of(lambda axes, ink: plots._by_depth(axes, rows, ink))
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    axes = axes_of(lambda axes, ink: plots._worst(axes, rows, ink))
    assert axes.get_title(loc="left") == "The only layer with an error"


@pytest.mark.parametrize(("bytes_before", "unit"), [(13_000_000, "MB"), (24_000_000_000, "GB")])
def test_sizes_are_in_the_unit_that_fits_the_largest(bytes_before, unit):
    row = {"format": "nvfp4", "layers": 1, "bytes_before": bytes_before, "bytes_after": 10**6}
    axes = axes_of(lambda axes, ink: plots._sizes(axes, {"summary": [row]}, ink))
    assert axes.get_xlabel() == unit


def test_a_legend_of_long_names_stays_inside_of_the_picture():
    kinds = ("img_attn.qkv", "txt_attn.to_out_projection", "img_mlp.0", "img_mlp.2", "img_mod.lin")
    rows = [{"name": f"double_blocks.{b}.{k}", "rel_l2": 0.1} for b in range(3) for k in kinds]
    axes = axes_of(lambda axes, ink: plots._by_depth(axes, rows, ink))
    (legend,) = axes.figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= 100 * plots.WIDTH


def test_the_header_is_read_once_after_a_conversion_however_many_layers_it_names(
    model, monkeypatch
):
    """Once a layer, 6,000 layers took more than ten minutes."""
    calls = []

    def counted(metadata):
        calls.append(metadata)
        return header_markers(metadata)

    monkeypatch.setattr(second_reading, "header_markers", counted)
    report, _ = converted(model)
    assert len(calls) < len(report.results)
    assert len(calls) == 2  # the markers, and the lengths of what was decoded


def test_a_long_name_keeps_its_block_and_its_end():
    name = "model.layers.31.block_sparse_moe.experts.8.down_proj"
    short = plots._short(name)
    assert short.startswith("31…") and short.endswith(".experts.8.down_proj")
    assert len(short) == plots.NAME_LENGTH
    assert plots._short("single_blocks.3.modulation.lin", 24) == "…blocks.3.modulation.lin"
    assert plots._short("a" * 40) == "…" + "a" * 33 and plots._short("layers.1.q") == "layers.1.q"
