"""Fit to Size, Quality Report and Compare Models: what their outputs hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.helpers import fewbits


@pytest.fixture
def conditioning():
    generator = torch.Generator().manual_seed(1)
    context, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 8, 768), (1, 768)))
    return [[context, {"pooled_output": pooled}]]


@pytest.fixture(autouse=True)
def hidden(comfy, monkeypatch):
    """What ComfyUI tells a node of its place in the graph."""
    from fewbits.nodes import compare_models, fit_to_size, quality_report, quantize_file

    place = type("Hidden", (), {"unique_id": "1"})
    for node in (
        compare_models.FewBitsCompareModels,
        fit_to_size.FewBitsFitToSize,
        quality_report.FewBitsQualityReport,
        quantize_file.FewBitsQuantizeFile,
    ):
        monkeypatch.setattr(node, "hidden", place, raising=False)


class FlatVae:
    """Three channels of the latent as a picture."""

    def decode(self, latent):
        return (
            latent[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2) / 6 + 0.5
        )


@pytest.fixture
def quantized(comfy, model_file, tmp_path):
    """Format -> the tiny model in it, loaded; `break_layer` multiplies one scale by 8."""

    def load(format, break_layer=None):
        path = tmp_path / f"{format.partition(':')[0]}_{bool(break_layer)}.safetensors"
        done = fewbits("quantize", model_file, "-o", path, "--format", format, "--no-report")
        assert done.returncode == 0, done.stderr
        if break_layer:
            tensors = load_file(path)
            tensors[f"{break_layer}.weight_scale"] *= 8
            save_file(tensors, path, metadata=metadata_of(path))
        return comfy.sd.load_diffusion_model(str(path))

    return load


def metadata_of(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


def test_models_are_compared_ranked_and_the_broken_block_is_named(model, quantized, conditioning):
    from fewbits.nodes.compare_models import FewBitsCompareModels

    broken = "single_blocks.0.linear1"
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    output = FewBitsCompareModels.execute(
        model_a=model,
        model_b=quantized("bnb_nf4"),
        positive=conditioning,
        negative=conditioning,
        latent_image=latent,
        vae=FlatVae(),
        model_c=quantized("int8_tensorwise"),
        model_d=quantized("int8_tensorwise:convrot=false", break_layer=broken),
        seeds=2,
        steps=2,
        control=True,
    )
    images, sentence, report = output.args
    found = json.loads(report)
    assert json.loads(json.dumps(output.ui)) == {"fewbits_comparison": [found]}
    assert found["ranking"] == ["C", "B", "D"]
    b, c, d = found["models"]
    assert d["suspects"] == [broken], (d["worst_layers"], c["worst_layers"], b["worst_layers"])
    assert f"layer {broken} in block single_blocks.0" in sentence
    assert b["suspects"] == c["suspects"] == []
    assert c["worst_layers"][0]["rel_l2"] < 0.012 < 0.07 < b["worst_layers"][0]["rel_l2"] < 0.12
    assert d["worst_layers"][0]["rel_l2"] == pytest.approx(7, rel=0.01)
    assert len(c["steps"]) == 3 and c["steps"][0]["snr_db"]["count"] == 2
    assert images.shape == (1, 3 * (18 + 64), 7 * 64, 3)


def test_a_model_is_identical_to_itself(model, conditioning):
    from fewbits.nodes.compare_models import FewBitsCompareModels

    _, sentence, report = FewBitsCompareModels.execute(
        model_a=model,
        model_b=model.clone(),
        positive=conditioning,
        negative=conditioning,
        latent_image={"samples": torch.zeros(1, 16, 8, 8)},
        vae=FlatVae(),
        seeds=1,
        steps=2,
    ).args
    assert sentence == "B is identical to A."
    assert json.loads(report)["models"][0]["worst_layers"][0]["rel_l2"] == 0


@pytest.mark.slow
def test_a_fit_is_a_recipe_for_quantize_file(host, model_file):
    import folder_paths

    from fewbits.nodes.fit_to_size import FewBitsFitToSize
    from fewbits.nodes.quality_report import FewBitsQualityReport
    from fewbits.nodes.quantize_file import FewBitsQuantizeFile

    place = folder_paths.get_folder_paths("diffusion_models")[0]
    model_file.rename(f"{place}/flux.safetensors")
    choice = "diffusion_models/flux.safetensors"
    output = FewBitsFitToSize.execute(choice, target="50%")
    report, draft = output.args
    data = json.loads(report)
    assert json.loads(json.dumps(output.ui)) == {"fewbits_fit": [data]}
    assert data["file_bytes"] <= data["fit"]["goal"]["bytes"]
    path, made = FewBitsQuantizeFile.execute(
        choice, format=draft.primary.format, recipe=draft, filename="diffusion_models/fit"
    ).args
    assert json.loads(made)["bytes_after"] == data["bytes_after"]
    assert Path(path).stat().st_size == data["file_bytes"]
    assert Path(path).with_name("fit.fewbits.json").is_file()
    drawn = FewBitsQualityReport.execute(made, theme="light")
    images, text = drawn.args
    (shown,) = drawn.ui["fewbits_quality"]
    assert len(shown["worst"]) == 5 and shown["meaning"] and "layers" not in shown
    assert images.shape == (3, 640, 1024, 3) and float(images[:, 0, 0].min()) == 1.0
    assert text.startswith("# ") and "| layer |" in text
    images, _ = FewBitsQualityReport.execute(made, theme="dark", path=path).args
    assert images.shape == (4, 640, 1024, 3)


def test_histograms_are_read_from_comfyuis_folders_only(comfy, tmp_path):
    from fewbits.nodes.bridge.host import written_file
    from fewbits.quant_ops.errors import CheckpointError

    outside = tmp_path / "model.safetensors"
    outside.write_bytes(b"0")
    for path in (str(outside), "", "no such file", "../model.safetensors"):
        with pytest.raises(CheckpointError, match="no such file in ComfyUI's"):
            written_file(path)


def test_pictures_are_made_of_reports_only(comfy):
    from fewbits.nodes.quality_report import FewBitsQualityReport
    from fewbits.quant_ops.errors import RecipeError

    for text in ("", "{}", "[1]", "words"):
        with pytest.raises(RecipeError, match="no report of a conversion"):
            FewBitsQualityReport.execute(text)


PATCHED = "single_blocks.0.linear1"


def with_patch(model, strength):
    """A clone of a MODEL, on the same module, with a LoRA of one layer."""
    patched = model.clone()
    key = f"diffusion_model.{PATCHED}.weight"
    patched.add_patches({key: ("diff", (change_of(model),))}, strength)
    return patched


def change_of(model):
    shape = model.model.diffusion_model.get_submodule(PATCHED).weight.shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.1


@pytest.mark.parametrize("format", [None, "int8_tensorwise"])
def test_models_that_share_one_module_are_compared_with_their_own_loras(
    model, quantized, conditioning, format
):
    from fewbits.nodes.compare_models import FewBitsCompareModels

    base = quantized(format) if format else model
    strong, weak = with_patch(base, 1.0), with_patch(base, 0.1)
    assert strong.model is base.model
    weight = base.model.diffusion_model.get_submodule(PATCHED).weight
    weight = (weight.dequantize() if format else weight).detach().double().numpy().copy()
    change = change_of(base).double().numpy()

    def error(reference, other):
        first = weight + reference * change
        return np.linalg.norm((other - reference) * change) / np.linalg.norm(first)

    orders = (
        ((base, 0.0), (strong, 1.0), (weak, 0.1), (strong.clone(), 1.0)),
        ((strong, 1.0), (base, 0.0), (weak, 0.1), (strong.clone(), 1.0)),
    )
    for (reference, own), *others in orders:
        patchers = dict(zip(("model_b", "model_c", "model_d"), (each for each, _ in others)))
        _, sentence, report = FewBitsCompareModels.execute(
            model_a=reference,
            positive=conditioning,
            negative=conditioning,
            latent_image={"samples": torch.zeros(1, 16, 8, 8)},
            vae=FlatVae(),
            seeds=1,
            steps=2,
            **patchers,
        ).args
        for row, (_, strength) in zip(json.loads(report)["models"], others, strict=True):
            worst, second = row["worst_layers"][:2]
            assert row["identical"] == (strength == own)
            assert worst["rel_l2"] == pytest.approx(error(own, strength), rel=1e-4)
            assert second["rel_l2"] == 0 and row["suspects"] == []
            assert worst["name"] == PATCHED or strength == own
        assert "broken" not in sentence
