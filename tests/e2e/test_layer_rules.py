"""Layer Rules in a real ComfyUI: one recipe for a graph and a command, and the plan before anything is converted."""

import json

import pytest

from support.harness import EMOJI, emoji_workflow
from support.harness.metrics import ssim
from support.helpers import fewbits

EMOJI_FILE = "diffusion_models/emoji_flux.safetensors"
LAYER_CONFIG = {
    "double_blocks.0.txt_attn.*": {"format": "bnb_nf4"},
    "_exclusions": ["single_blocks.3.modulation.lin"],
}
# What the rules below make of the emoji model; every other layer keeps its preset or becomes the primary.
DECIDED = {
    "double_blocks.0.txt_attn.qkv": ("bnb_nf4", "layer-config 'double_blocks.0.txt_attn.*'"),
    "single_blocks.3.modulation.lin": (
        None,
        "layer-config _exclusions 'single_blocks.3.modulation.lin'",
    ),
    "single_blocks.0.linear1": (None, "rule 'single_blocks.0.*'"),
    "single_blocks.0.linear2": ("float8_e4m3fn", "rule 'single_blocks.0.linear2'"),
    "single_blocks.1.linear1": ("int8_tensorwise", "primary"),
    "img_in": (None, "preset flux 'img_in'"),
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def chained_rules():
    """Two Layer Rules, a and b; b's rules come first."""
    return {
        "a": node("FewBitsLayerRules", pattern="single_blocks.0.*\nnothing.*", text=json.dumps(LAYER_CONFIG)),
        "b": node("FewBitsLayerRules", recipe=["a", 0], pattern="single_blocks.0.linear2", format="float8_e4m3fn",
                  options="method=mse_clip"),
    }  # fmt: skip


def decided(plan):
    rows = {row["name"]: row for row in plan["layers"]}
    return {name: (rows[name]["format"], rows[name]["rule"]) for name in DECIDED}


def refused(run, node_id, *parts):
    assert run.status == "error" and run.error["node_id"] == node_id
    for part in parts:
        assert part in run.error["exception_message"]


@pytest.fixture(scope="module")
def saved(server):
    """One graph: a MODEL and the same file through the same rules, the model saved, the recipe saved; and its run."""
    workflow = emoji_workflow()
    workflow |= chained_rules()
    wish = {"format": "int8_tensorwise", "scaling": "row", "recipe": ["b", 0]}
    workflow["model"] = node("FewBitsQuantizeINT8", model=["3", 0], **wish)
    workflow["file"] = node("FewBitsQuantizeFile", file=EMOJI_FILE, filename="rules/file", **wish)
    workflow["save"] = node("FewBitsSaveComfyQuant", model=["model", 0], filename="rules/model")
    workflow["recipe"] = node("FewBitsSaveRecipe", report=["model", 1], filename="rules/recipe")
    workflow["7"]["inputs"]["model"] = ["model", 0]
    run = server.run(workflow)
    assert run.status == "success", run.error
    return run


def test_rules_decide_in_the_graph_and_the_mixed_model_draws_the_picture(server, saved):
    (report,) = saved.history["outputs"]["model"]["fewbits_report"]
    assert decided(report) == DECIDED
    assert report["unmatched"] == ["nothing.*"]
    assert any("rule 'nothing.*' matched nothing" in warning for warning in report["warnings"])
    original = server.run(emoji_workflow()).images()[0]
    assert ssim(saved.images()[0], original) > 0.97


def test_a_command_with_the_saved_recipe_writes_the_bytes_of_the_graph(server, saved, tmp_path):
    folder = server.output / "rules"
    result = fewbits("quantize", EMOJI / "emoji_flux.safetensors", "-o", tmp_path / "command.safetensors",
                     "--recipe", folder / "recipe.toml")  # fmt: skip
    assert result.returncode == 0, result.stderr
    wanted = (folder / "file.safetensors").read_bytes()
    assert (tmp_path / "command.safetensors").read_bytes() == wanted
    assert (folder / "model.safetensors").read_bytes() == wanted


def test_a_saved_recipe_pasted_into_another_graph_writes_the_same_bytes(server, saved):
    folder = server.output / "rules"
    text = (folder / "recipe.toml").read_text(encoding="utf-8")
    run = server.run({
        "r": node("FewBitsLayerRules", text=text),
        "q": node("FewBitsQuantizeFile", file=EMOJI_FILE, filename="rules/pasted", format="mxfp8", recipe=["r", 0]),
    })  # fmt: skip
    assert run.status == "success", run.error
    assert (folder / "pasted.safetensors").read_bytes() == (
        folder / "file.safetensors"
    ).read_bytes()


def test_the_plan_is_shown_before_anything_is_converted(server):
    before = sorted(server.output.rglob("*"))
    run = server.run({
        **chained_rules(),
        "i": node("FewBitsInspectFile", file=EMOJI_FILE, preview="int8_tensorwise", recipe=["b", 0]),
        "text": node("PreviewAny", source=["i", 0]),
        "recipe": node("FewBitsSaveRecipe", report=["i", 1]),
        "toml": node("PreviewAny", source=["recipe", 1]),
    })  # fmt: skip
    assert run.status == "success", run.error
    (inspection,) = run.history["outputs"]["i"]["fewbits_inspection"]
    assert decided(inspection["plan"]) == DECIDED
    lines = "".join(run.history["outputs"]["text"]["text"]).splitlines()
    (line,) = [line for line in lines if " double_blocks.0.txt_attn.qkv " in line]
    assert line.startswith("bnb_nf4") and "[layer-config 'double_blocks.0.txt_attn.*'" in line
    assert any(line.endswith("rule 'nothing.*'  (matched nothing)") for line in lines)
    assert '[[rule]]\nmatch = "single_blocks.0.linear2"' in "".join(
        run.history["outputs"]["toml"]["text"]
    )
    assert sorted(server.output.rglob("*")) == before


def test_wrong_rules_are_refused_by_their_own_node(server):
    def run(inspect=None, **inputs):
        rules = {"r": node("FewBitsLayerRules", **inputs)}
        inspected = node("FewBitsInspectFile", file=EMOJI_FILE, recipe=["r", 0], **(inspect or {}))
        return server.run({**rules, "i": inspected})

    refused(run(pattern="re:("), "r", "pattern 're:(' is not a regular expression")
    refused(
        run(text='{"img_in": {"format": "fp8_scaled"}}'),
        "r",
        "unknown format 'fp8_scaled', did you mean 'float8_e4m3fn'?",
    )
    refused(run(text="[primary]\nformat = 'int9'"), "r", "recipe pasted: unknown format 'int9'")
    refused(run(pattern="img_in"), "i", "no [primary] table; choose in preview")
    refused(run(pattern="x", preset="none", inspect={"preview": "none"}), "i", "choose in preview")


def test_a_node_refuses_a_recipe_for_another_format(server):
    workflow = emoji_workflow()
    workflow["r"] = node("FewBitsLayerRules", text='[primary]\nformat = "int8_tensorwise"')
    workflow["q"] = node(
        "FewBitsQuantizeFP8", model=["3", 0], format="float8_e4m3fn", recipe=["r", 0]
    )
    workflow["7"]["inputs"]["model"] = ["q", 0]
    refused(
        server.run(workflow),
        "q",
        "primary format is int8_tensorwise, Quantize FP8 makes float8_e4m3fn",
    )
