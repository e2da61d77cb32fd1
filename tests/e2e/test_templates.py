"""Every template of the pack runs as it is saved, headless; the emoji model stands in for the large ones."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from support import dialects
from support.harness import EMOJI, PACK
from support.harness.workflow import prompt_of
from support.helpers import clip_shapes, random_tensors

FOLDER = PACK / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
# Run with all of their steps, and looked at, in test_calibrated.py, test_nodes.py and test_text_encoders.py.
ELSEWHERE = {"calibrate_and_quantize", "quantize_int8_emoji", "quantize_text_encoder"}
STAND_INS = (
    "flux1-dev",
    "qwen_image_bf16",
    "wan2.2_t2v_high_noise_14B_fp16",
    "wan2.2_t2v_low_noise_14B_fp16",
    "z_image_turbo_bf16",
)
MODEL = EMOJI / "emoji_flux.safetensors"


@pytest.fixture(scope="module")
def models(server, tmp_path_factory):
    """The emoji model under the names that the templates have, also as a checkpoint and in old FP8."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for name in STAND_INS:
        server.add_model("diffusion_models", shutil.copyfile(MODEL, folder / f"{name}.safetensors"))
    tensors = load_file(MODEL)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(whole, folder / "sd_xl_base_1.0.safetensors")
    server.add_model("checkpoints", folder / "sd_xl_base_1.0.safetensors")
    legacy = dict(tensors)
    for name in tensors:
        base = name.removesuffix(".weight")
        if name.endswith(".weight") and tensors[name].ndim == 2 and "blocks." in name:
            legacy |= dialects.scaled_fp8(base, tensors[name].float())
    legacy["scaled_fp8"] = tensors[name].new_zeros(2).to(legacy[f"{base}.weight"].dtype)
    save_file(legacy, folder / "flux_dev_fp8_scaled.safetensors")
    server.add_model("diffusion_models", folder / "flux_dev_fp8_scaled.safetensors")
    save_file(random_tensors(clip_shapes()), folder / "clip_l.safetensors")
    server.add_model("text_encoders", folder / "clip_l.safetensors")
    calibration = server.output / "calibrations" / "emoji_flux.safetensors"
    return calibration


def quick(prompt):
    """The prompt with two steps where it has more: what is drawn is another test's business."""
    for item in prompt.values():
        if "steps" in item["inputs"]:
            item["inputs"]["steps"] = 2
    return prompt


def graph_of(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted({*NAMES} - ELSEWHERE))
def test_a_template_runs_as_it_is_saved(server, models, name):
    if name.startswith("Calibrated") and not models.exists():
        server.run(quick(prompt_of(server, graph_of("calibrate_and_quantize"))))
    run = server.run(quick(prompt_of(server, graph_of(name))))
    assert run.status == "success", run.error
    for output in run.history["outputs"].values():
        for written in (*output.get("fewbits_report", ()), *output.get("fewbits_saved", ())):
            if "saved" in written:
                assert (server.output / written["saved"]["path"].removeprefix("output/")).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_no_node_of_a_template_lies_on_another(name):
    """In the larger of both renderers: a title is 30 high, and Nodes 2.0 has a foot of 40."""
    boxes = [(node["id"], *node["pos"], *node["size"]) for node in graph_of(name)["nodes"]]
    for id, x, y, width, height in boxes:
        for other, left, top, w, h in boxes:
            apart = (
                x + width <= left or left + w <= x or y + height <= top - 30 or top + h <= y - 30
            )
            assert id == other or apart, (id, other)
