"""What is left of a LoRA that was baked in: by numbers of numpy, in words, and a warning where it drowns."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewbits.quant_ops.report.layer import retention
from fewbits.quant_ops.report.markdown import to_markdown
from support.helpers import EMOJI

LORA = EMOJI.with_name("emoji_lora_blue.safetensors")
STRONG, WEAK = 1.0, 0.01


@pytest.fixture
def report_of(comfy, quantize):
    """(wish, strength of the LoRA) -> the report of quantizing the emoji model with it baked in."""
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(LORA))

    def made(wish, strength):
        model = comfy.sd.load_diffusion_model(str(EMOJI))
        if strength:
            model, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)
        return quantize(model, wish)

    return made


def by_numpy(name, strength, quantized):
    base = load_file(EMOJI)[f"{name}.weight"].double().numpy()
    factors = load_file(LORA)
    up, down = (
        factors[f"diffusion_model.{name}.lora_{part}.weight"].double().numpy() for part in "BA"
    )
    delta = strength * up @ down
    weight = quantized.model.diffusion_model.get_submodule(name).weight
    decoded = weight.dequantize().double().cpu().numpy()
    moved, noise = decoded - base, decoded - base - delta
    size = np.linalg.norm(delta)
    return {
        "kept": (moved * delta).sum() / size**2,
        "noise": np.linalg.norm(noise) / size,
        "cosine": (moved * delta).sum() / size / np.linalg.norm(moved),
    }


@pytest.mark.parametrize("wish", ["int8_tensorwise", "bnb_nf4"])
@pytest.mark.parametrize("strength", [STRONG, WEAK])
def test_the_numbers_are_those_of_the_stored_codes(report_of, wish, strength):
    quantized, report = report_of(wish, strength)
    rows = {row["name"]: row["patch"] for row in report.to_json()["layers"] if "patch" in row}
    assert len(rows) == 16  # of the LoRA's 18 layers; the preset keeps the others
    for name in ("double_blocks.0.img_mlp.0", "single_blocks.3.linear2"):
        for key, value in by_numpy(name, strength, quantized).items():
            assert rows[name][key] == pytest.approx(value, rel=2e-3), (name, key)


def test_a_strong_lora_survives_and_a_weak_one_drowns_and_both_are_said(report_of):
    _, strong = report_of("int8_tensorwise", STRONG)
    _, weak = report_of("bnb_nf4", WEAK)
    found = strong.patches()
    assert (
        found["drowned"] == []
        and found["kept"] == pytest.approx(1, abs=0.02)
        and found["noise"] < 0.3
    )
    assert found["survived"] > 0.95 and "survives rounding" in strong.to_text()
    assert f"LoRA baked in: {found['survived']:.0%} of it survives" in strong.to_text()
    assert "drowns" not in strong.to_text()
    found = weak.patches()
    assert len(found["drowned"]) == found["layers"] == 16 and found["noise"] > 5
    assert found["survived"] < 0.04
    assert f"LoRA baked in: {found['survived']:.0%} of it survives" in weak.to_text()
    said = (
        "in 16 of 16 layers it drowns, less than half survives: use more bits, or apply it to the "
        "quantized model"
    )
    assert said in weak.to_text() and said in to_markdown(weak.to_json())


def test_without_a_lora_nothing_is_said_of_one(report_of):
    _, report = report_of("int8_tensorwise", 0)
    assert report.patches() is None and "patches" not in report.to_json()
    assert "LoRA" not in report.to_text()


def test_a_change_that_rounding_takes_away_is_gone():
    base, weight = torch.zeros(4, 8), torch.full((4, 8), 0.25)
    gone = retention(base, weight, torch.zeros(4, 8))
    assert (gone.kept, gone.noise, gone.cosine) == (0.0, 1.0, 0.0)
    assert gone.survived == 0 and gone.drowned
    whole = retention(base, weight, weight)
    assert (whole.kept, whole.noise, whole.cosine) == (1.0, 0.0, 1.0) and not whole.drowned
    assert whole.survived == 1
    shrunk = retention(base, weight, 0.25 * weight)  # it points the right way, and is mostly lost
    assert shrunk.cosine == pytest.approx(1) and shrunk.survived == 0.25 and shrunk.drowned
    assert retention(weight, weight, base) is None
