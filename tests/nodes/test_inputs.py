"""No node writes onto a file that a model comes from, and Save Recipe replaces whole files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support import dialects
from support.helpers import EMOJI, flux_shapes, random_tensors


@pytest.fixture
def in_output(host, tmp_path):
    """A model in the output folder, where both the loaders and the savers reach it."""
    path = tmp_path / "output" / "diffusion_models" / "m.safetensors"
    save_file(random_tensors(flux_shapes()), path)
    return path


@pytest.fixture
def run(host):
    def execute(node, **inputs):
        return node.PREPARE_CLASS_CLONE(None).execute(**inputs)

    return execute


def refused(path, call):
    from fewbits.quant_ops.errors import QuantError

    before = path.read_bytes()
    with pytest.raises(QuantError, match="an input is never changed: name another file"):
        call()
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*"))


def test_quantize_file_does_not_replace_its_file(run, in_output):
    from fewbits.nodes.quantize_file import FewBitsQuantizeFile

    inputs = {"file": "diffusion_models/m.safetensors", "format": "int8_tensorwise"}
    refused(
        in_output,
        lambda: run(FewBitsQuantizeFile, **inputs, filename="diffusion_models/m", overwrite=True),
    )


def test_convert_fp8_scaled_does_not_replace_its_file(run, in_output):
    from fewbits.nodes.convert_fp8_scaled import FewBitsConvertFP8Scaled

    state = dialects.scaled_fp8("layer", torch.randn(32, 32)) | {"scaled_fp8": torch.zeros(0)}
    save_file(state, in_output)
    inputs = {"file": "diffusion_models/m.safetensors", "filename": "diffusion_models/m"}
    refused(in_output, lambda: run(FewBitsConvertFP8Scaled, **inputs, overwrite=True))


def test_save_does_not_replace_the_file_its_model_came_from(run, in_output, comfy, quantize):
    from fewbits.nodes.save import FewBitsSaveComfyQuant

    shutil.copyfile(EMOJI, in_output)
    loaded = comfy.sd.load_diffusion_model(str(in_output))
    again = in_output.with_name("again.safetensors")
    os.link(in_output, again)
    for model in (loaded, quantize(loaded)[0], quantize(loaded)[0].clone()):
        for name in ("m", "again"):
            inputs = {"model": model, "filename": f"diffusion_models/{name}", "overwrite": True}
            refused(in_output, lambda inputs=inputs: run(FewBitsSaveComfyQuant, **inputs))
    path, _ = run(FewBitsSaveComfyQuant, model=loaded, filename="diffusion_models/other").args
    assert os.path.isfile(path)


def test_no_node_keeps_a_file_that_went_wrong_while_it_was_written(
    run, in_output, comfy, quantize, monkeypatch
):
    from fewbits.nodes.convert_fp8_scaled import FewBitsConvertFP8Scaled
    from fewbits.nodes.quantize_file import FewBitsQuantizeFile
    from fewbits.nodes.save import FewBitsSaveComfyQuant
    from fewbits.quant_ops.checkpoint.writer import FileSink
    from fewbits.quant_ops.errors import CheckpointError

    commit = FileSink.commit

    def damaged(sink, *given):
        path = sink._part.path
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        commit(sink, *given)

    state = dialects.scaled_fp8("layer", torch.randn(32, 32)) | {"scaled_fp8": torch.zeros(0)}
    save_file(state, in_output.with_name("old.safetensors"))
    shutil.copyfile(EMOJI, in_output)
    model = quantize(comfy.sd.load_diffusion_model(str(in_output)))[0]
    before = sorted(in_output.parent.iterdir())
    monkeypatch.setattr(FileSink, "commit", damaged)
    source, name = "diffusion_models/m.safetensors", "diffusion_models/new"
    nodes = {
        FewBitsQuantizeFile: {"file": source, "format": "int8_tensorwise", "filename": name},
        FewBitsConvertFP8Scaled: {"file": "diffusion_models/old.safetensors", "filename": name},
        FewBitsSaveComfyQuant: {"model": model, "filename": name},
    }
    for node, inputs in nodes.items():
        with pytest.raises(CheckpointError, match="does not read back as written"):
            run(node, **inputs)
        assert sorted(in_output.parent.iterdir()) == before


def test_save_does_not_replace_a_file_that_a_loader_unknown_to_us_was_called_with(
    run, in_output, comfy
):
    from fewbits.nodes.save import FewBitsSaveComfyQuant

    model = comfy.sd.load_diffusion_model(str(in_output))
    model.cached_patcher_init = (print, ([str(in_output)], {}), 0)
    inputs = {"model": model, "filename": "diffusion_models/m", "overwrite": True}
    refused(in_output, lambda: run(FewBitsSaveComfyQuant, **inputs))


def save_recipe(run, text):
    from fewbits.nodes.layer_rules import FewBitsSaveRecipe

    report = json.dumps({"recipe": text})
    return run(FewBitsSaveRecipe, report=report, filename="rules/r", overwrite=True)


def test_a_recipe_that_cannot_be_encoded_leaves_the_old_one(run, tmp_path):
    from fewbits.quant_ops.errors import RecipeError

    path, _ = save_recipe(run, "old").args
    with pytest.raises(RecipeError, match="half a character"):
        save_recipe(run, "new \ud800")
    assert Path(path).read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path / "output" / "rules") == ["r.toml"]


def test_a_recipe_without_a_name_is_shown_and_not_written(run, tmp_path):
    from fewbits.nodes.layer_rules import FewBitsSaveRecipe

    output = run(FewBitsSaveRecipe, report=json.dumps({"recipe": "version = 1"}))
    assert output.args == ("", "version = 1")
    assert output.ui == {"fewbits_saved": [{"text": "recipe", "recipe": "version = 1"}]}
    assert not list((tmp_path / "output").rglob("*.toml"))


def test_a_recipe_is_not_written_through_links(run, tmp_path):
    path, _ = save_recipe(run, "old").args
    os.link(path, tmp_path / "mine.toml")
    save_recipe(run, "new")
    assert Path(path).read_text(encoding="utf-8") == "new"
    assert (tmp_path / "mine.toml").read_text() == "old"


@pytest.mark.parametrize("recipe", [5, ["a"], {"a": 1}, True], ids=str)
def test_a_report_whose_recipe_is_no_text_is_refused(run, recipe):
    from fewbits.quant_ops.errors import RecipeError

    for report in ({"recipe": recipe}, {"plan": recipe}, {"plan": {"recipe": recipe}}):
        from fewbits.nodes.layer_rules import FewBitsSaveRecipe

        with pytest.raises(RecipeError, match="has no recipe"):
            run(FewBitsSaveRecipe, report=json.dumps(report), filename="r")


def test_a_report_nested_without_end_is_refused(run):
    from fewbits.nodes.layer_rules import FewBitsSaveRecipe
    from fewbits.quant_ops.errors import RecipeError

    with pytest.raises(RecipeError, match="has no recipe"):
        run(FewBitsSaveRecipe, report="[" * 100_000, filename="r")


def test_quantize_file_takes_a_quantized_file_only_where_it_is_told_to(run, in_output):
    from fewbits.nodes.quantize_file import FewBitsQuantizeFile
    from fewbits.quant_ops.errors import QuantError

    fp8 = run(
        FewBitsQuantizeFile,
        file="diffusion_models/m.safetensors",
        format="float8_e4m3fn",
        filename="diffusion_models/fp8",
    )
    made = Path(fp8.result[0])
    inputs = {"file": f"diffusion_models/{made.name}", "format": "int8_tensorwise"}
    with pytest.raises(QuantError, match="quantized already .float8_e4m3fn"):
        run(FewBitsQuantizeFile, **inputs, filename="diffusion_models/int8")
    again = run(FewBitsQuantizeFile, **inputs, filename="diffusion_models/int8", requantize=True)
    report = json.loads(again.result[1])
    assert report["rounded_twice"]
    assert any("unknown without the original" in text for text in report["warnings"])


# ---- the last look at what a node has written ----

ROWS = "float8_e4m3fn_rowwise"


@pytest.fixture
def mislabelled(monkeypatch):
    """A defect: rows are written under the tag of one scale, which ComfyUI reads in another way."""
    from fewbits.quant_ops.formats import get_format

    format = type(get_format(ROWS))
    monkeypatch.setattr(format, "marker", lambda self, layer, options: {"format": "float8_e4m3fn"})


def not_kept(folder, call):
    from fewbits.quant_ops.errors import CheckpointError

    with pytest.raises(
        CheckpointError, match="finished file has .* problems.*(tag-says|names-mis)"
    ):
        call()
    assert not [path.name for path in folder.iterdir() if "made" in path.name]
    assert not list(folder.glob(".*"))


def test_save_comfy_quant_keeps_no_file_that_has_a_problem(
    run, in_output, comfy, quantize, request
):
    from fewbits.nodes.save import FewBitsSaveComfyQuant

    model, _ = quantize(comfy.sd.load_diffusion_model(str(in_output)), ROWS)
    request.getfixturevalue("mislabelled")
    inputs = {"model": model, "filename": "diffusion_models/made"}
    not_kept(in_output.parent, lambda: run(FewBitsSaveComfyQuant, **inputs))


def test_convert_fp8_scaled_keeps_no_file_that_has_a_problem(run, in_output, monkeypatch):
    from fewbits.nodes.convert_fp8_scaled import FewBitsConvertFP8Scaled
    from fewbits.quant_ops.doors import problems

    state = dialects.scaled_fp8("layer", torch.randn(32, 32)) | {"scaled_fp8": torch.zeros(0)}
    save_file(state, in_output)
    found = [problems.MISPLACED.at("", "a defect would lose the prefix")]
    monkeypatch.setattr(problems, "problems", lambda source: found)
    inputs = {"file": "diffusion_models/m.safetensors", "filename": "diffusion_models/made"}
    not_kept(in_output.parent, lambda: run(FewBitsConvertFP8Scaled, **inputs))


def test_quantize_file_keeps_no_file_that_has_a_problem(run, in_output, mislabelled):
    from fewbits.nodes.quantize_file import FewBitsQuantizeFile

    inputs = {"file": "diffusion_models/m.safetensors", "format": ROWS}
    not_kept(
        in_output.parent,
        lambda: run(FewBitsQuantizeFile, **inputs, filename="diffusion_models/made"),
    )
