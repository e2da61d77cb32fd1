"""The template of calibration, as one prompt over HTTP: calibrate, quantize, save, sample."""

import json

import pytest
import torch
from safetensors import safe_open

from support.harness import PACK
from support.harness.workflow import prompt_of

CALIBRATED, NEAREST, ORIGINAL = 11, 12, 13  # its samplers


@pytest.fixture(scope="module")
def run(server):
    """The template, with every sampler's latent saved."""
    path = PACK / "example_workflows" / "Calibrate, then quantize.json"
    prompt = prompt_of(server, json.loads(path.read_text(encoding="utf-8")))
    for sampler in (CALIBRATED, NEAREST, ORIGINAL):
        prompt[f"latent {sampler}"] = {
            "class_type": "SaveLatent",
            "inputs": {"samples": [str(sampler), 0], "filename_prefix": f"calibrated/{sampler}_"},
        }
    run = server.run(prompt)
    assert run.status == "success", run.error
    return run


def latent(server, sampler):
    (path,) = (server.output / "calibrated").glob(f"{sampler}_*.latent")
    with safe_open(path, "pt") as file:
        return file.get_tensor("latent_tensor").float()


def test_the_calibrated_picture_is_nearer_to_the_original(server, run):
    """Latents, from the original's: .028 calibrated and .165 nearest, for the prompt it was made for."""
    original = latent(server, ORIGINAL)
    calibrated, nearest = (
        float((latent(server, sampler) - original).norm()) for sampler in (CALIBRATED, NEAREST)
    )
    assert calibrated < 0.4 * nearest
    assert nearest < 0.3 * float(original.norm())


def test_everything_is_where_its_node_says(server, run):
    written = server.output / "diffusion_models" / "emoji_flux_nf4_calibrated.safetensors"
    with safe_open(written, "pt") as file:
        marker = file.get_tensor("double_blocks.0.img_mlp.0.comfy_quant")
    assert json.loads(bytes(marker.to(torch.uint8)))["format"] == "bnb_nf4"
    assert (server.output / "calibrations" / "emoji_flux.safetensors").is_file()
    assert len(run.images()) == 3
