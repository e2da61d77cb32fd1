"""The nodes in a real ComfyUI, over HTTP and the websocket, as the page and scripts use them."""

import json
import time
from urllib.parse import quote

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import version_key
from support.harness import EMOJI, PACK, emoji_workflow
from support.harness.metrics import ssim
from support.harness.workflow import prompt_of
from support.helpers import flux_shapes, random_tensors

ORIGINAL = EMOJI / "emoji_flux.safetensors"
IDS = [*json.loads((PACK / "node_list.json").read_text(encoding="utf-8"))]
FORMATS = {"FewBitsQuantizeFP8": "float8_e4m3fn", "FewBitsQuantizeINT8": "int8_tensorwise",
           "FewBitsQuantizeNF4": "bnb_nf4", "FewBitsQuantizeFP4": "nvfp4"}  # fmt: skip
EXAMPLES = sorted(path.stem for path in (PACK / "example_workflows").glob("*.json"))
EMOJI_FILE = "diffusion_models/emoji_flux.safetensors"
SAME_PICTURE = (
    0.985  # SSIM of one prompt against the original's; two prompts of unlike emoji: below 0.8
)
FEW_STEPS = 4  # where pictures are equal to the last pixel
LIKE_PICTURE = {"bnb_nf4": 0.90, "nvfp4": 0.90}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def quantize_and_sample(kind="FewBitsQuantizeINT8", *, lora=0.0, after=False, steps=16, **wish):
    """loader 1 -> LoRA 3 -> quantize -> sampler 7; with `after`, the LoRA goes between quantize and sampler."""
    workflow = emoji_workflow(lora=lora, steps=steps)
    workflow["quantize"] = node(
        kind, model=["1", 0] if after else ["3", 0], format=FORMATS[kind], **wish
    )
    workflow["3" if after else "7"]["inputs"]["model"] = ["quantize", 0]
    return workflow


def save(workflow, filename, source=("quantize", 0), **inputs):
    workflow["save"] = node(
        "FewBitsSaveComfyQuant", model=list(source), filename=filename, **inputs
    )
    return workflow


def picture(run):
    assert run.status == "success", run.error["exception_message"]
    return run.images()[0]


def convert(format, **inputs):
    """The emoji model through Quantize File, as node `q`."""
    return {"q": node("FewBitsQuantizeFile", **{"file": EMOJI_FILE, "format": format, **inputs})}


def files(server):
    return sorted(path for path in server.output.rglob("*") if path.is_file())


def refused(run, node_id, *parts):
    """The prompt ended in an error of that node, with the one-line message that says what to do."""
    assert run.status == "error" and run.error["node_id"] == node_id
    message = run.error["exception_message"].strip()
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.fixture(scope="module")
def original(server):
    return picture(server.run(emoji_workflow()))


@pytest.mark.parametrize("name", IDS)
def test_the_page_learns_names_tooltips_and_options(server, name):
    info = server.object_info(name)
    assert info["category"].startswith("FewBits/")
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    for key, (_, options) in inputs.items():
        assert options["tooltip"], key
        assert not (options.get("advanced") and key in info["input"]["required"]), key
    assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"])
    others = ("FewBitsLoadTextEncoder", "FewBitsLoadCheckpoint", "FewBitsLoadCalibration")
    if "file" in inputs and name not in others:
        assert any(
            choice.endswith("emoji_flux.safetensors") for choice in inputs["file"][1]["options"]
        )


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantized_model_draws_the_original_picture(server, original, kind):
    run = server.run(quantize_and_sample(kind))
    assert LIKE_PICTURE.get(FORMATS[kind], SAME_PICTURE) < ssim(picture(run), original) < 1.0
    (report,) = run.history["outputs"]["quantize"]["fewbits_report"]
    assert report["requires_pack"] == (FORMATS[kind] == "bnb_nf4") and report["device"] == "cpu"
    assert {row["format"] for row in report["layers"]} == {FORMATS[kind], None}
    assert 0 < report["rel_l2"] < (0.12 if FORMATS[kind] in LIKE_PICTURE else 0.03)


def test_plan_and_progress_arrive_over_the_websocket_before_the_report(server):
    workflow = {
        "1": node("UNETLoader", unet_name="emoji_flux.safetensors", weight_dtype="default"),
        "q": node(
            "FewBitsQuantizeFP8", model=["1", 0], format="float8_e4m3fn", keep="single_blocks.3.*"
        ),
    }
    run = server.run(save(workflow, "events/model", ("q", 0)))
    assert run.status == "success", run.error["exception_message"]
    order = [
        (m["type"], m["data"]["node_id"]) for m in run.messages if m["type"].startswith("fewbits.")
    ]
    for name in ("q", "save"):
        mine = [kind for kind, node_id in order if node_id == name]
        assert mine[0] == "fewbits.plan" and set(mine[1:]) == {"fewbits.progress"}
    plan = next(data["plan"] for data in run.events("fewbits.plan") if data["node_id"] == "q")
    kept = [row["name"] for row in plan["layers"] if row["reason"] == "rule 'single_blocks.3.*'"]
    assert kept == [
        "single_blocks.3.linear1",
        "single_blocks.3.linear2",
        "single_blocks.3.modulation.lin",
    ]
    last = [data for data in run.events("fewbits.progress") if data["node_id"] == "q"][-1]
    assert last["done"] == last["total"] == plan["bytes_before"] and last["eta_seconds"] == 0
    executed = {data["node"]: data["output"] for data in run.events("executed")}
    (report,) = executed["q"]["fewbits_report"]
    assert report["bytes_after"] == plan["bytes_after"] and len(report["worst"]) == 5


@pytest.mark.parametrize("kind", FORMATS)
def test_a_saved_model_draws_the_same_pixels_from_the_stock_loader_with_and_without_the_pack(
    server, stock, kind
):
    name = f"saved_{kind}"
    workflow = quantize_and_sample(kind, steps=FEW_STEPS)
    run = server.run(save(workflow, f"diffusion_models/{name}"))
    wanted = picture(run)
    again = emoji_workflow(f"{name}.safetensors", steps=FEW_STEPS)  # in the loader's list at once
    with_pack = picture(server.run(again))
    assert with_pack.tobytes() == wanted.tobytes()
    report = run.history["outputs"]["save"]["fewbits_report"][0]
    stock.add_model("diffusion_models", server.output / "diffusion_models" / f"{name}.safetensors")
    without_pack = stock.run(again)
    version = stock.stats["system"]["comfyui_version"]
    if report["requires_pack"] or version_key(version) < version_key(report["min_comfyui"]):
        assert without_pack.status == "error"
    else:
        assert picture(without_pack).tobytes() == wanted.tobytes()


def test_a_lora_before_quantizing_is_baked_and_one_after_it_works_too(server, original):
    wanted = picture(server.run(emoji_workflow(lora=1.0)))
    assert ssim(wanted, original) < 0.9
    before = picture(server.run(save(quantize_and_sample(lora=1.0), "lora/before")))
    after = picture(
        server.run(save(quantize_and_sample(lora=1.0, after=True), "lora/after", source=("3", 0)))
    )
    assert ssim(before, wanted) > SAME_PICTURE
    assert ssim(after, wanted) > 0.95
    for name, drawn in (("before", before), ("after", after)):
        path = server.add_model("diffusion_models", server.output / "lora" / f"{name}.safetensors")
        # Kept layers are rounded to bf16 in the file; everything else is what was sampled.
        assert ssim(picture(server.run(emoji_workflow(path.name))), drawn) > SAME_PICTURE


def test_a_file_is_converted_under_an_automatic_name_and_load_model_opens_it(server, original):
    run = server.run(convert("int8_tensorwise", overwrite=True))  # other tests take the name too
    assert run.status == "success", run.error["exception_message"]
    (report,) = run.history["outputs"]["q"]["fewbits_report"]
    name = report["saved"]["name"]
    assert name.startswith("emoji_flux_int8_tensorwise")
    assert (server.output / "diffusion_models" / name).is_file()
    workflow = emoji_workflow()
    workflow["load"] = node("FewBitsLoadModel", file=name)
    workflow["7"]["inputs"]["model"] = ["load", 0]
    run = server.run(workflow)
    assert ssim(picture(run), original) > SAME_PICTURE
    (inspection,) = run.history["outputs"]["load"]["fewbits_inspection"]
    assert inspection["formats"] == {"int8_tensorwise": 22} and inspection["findings"] == []


@pytest.mark.parametrize("convrot", [True, False])
def test_the_rotation_may_still_be_said_as_a_switch(server, convrot):
    wishes = {"convrot": convrot, "filename": f"diffusion_models/switched_{convrot}"}
    run = server.run(convert("int8_tensorwise", **wishes))
    assert run.status == "success", run.error["exception_message"]
    written = load_file(server.output / "diffusion_models" / f"switched_{convrot}.safetensors")
    marker = bytes(written["double_blocks.0.img_mlp.0.comfy_quant"])
    assert json.loads(marker).get("convrot", False) is convrot


def test_a_switch_of_old_means_nothing_for_formats_without_rotation(server):
    run = server.run(
        convert("float8_e4m3fn", convrot=False, filename="diffusion_models/unswitched")
    )
    assert run.status == "success", run.error["exception_message"]


def test_inspecting_shows_what_is_inside_and_previews_a_conversion(server):
    before = files(server)
    run = server.run({"i": node("FewBitsInspectFile", file=EMOJI_FILE, preview="float8_e4m3fn")})
    assert run.status == "success", run.error["exception_message"]
    (inspection,) = run.history["outputs"]["i"]["fewbits_inspection"]
    assert inspection["family"] == "Flux.1" and inspection["tensors"] == 72
    assert inspection["plan"]["summary"][0]["format"] == "float8_e4m3fn"
    assert files(server) == before


@pytest.fixture(scope="module")
def big_file(server, tmp_path_factory):
    """1.07 GB in layers of up to 132 MB, as in a large model."""
    block = (
        torch.randn(3072 * 64) * 0.02
    ).bfloat16()  # repeated: random numbers would take longer than the test

    def weight(shape):
        count = torch.Size(shape).numel()
        return block.repeat(-(-count // block.numel()))[:count].view(shape)

    tensors = {name: weight(shape) for name, shape in flux_shapes(3072).items()}
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    save_file(tensors, path)
    del tensors
    assert path.stat().st_size > 1e9
    linked = server.add_model("diffusion_models", path)
    yield path.name
    linked.unlink()
    path.unlink()
    server.request("/free", {"unload_models": True, "free_memory": True})


@pytest.mark.parametrize("door", ["file", "model"])
def test_a_cancelled_conversion_ends_soon_and_leaves_nothing(server, big_file, door):
    if door == "file":
        workflow = convert("float8_e4m3fn", file=f"diffusion_models/{big_file}")
    else:
        workflow = {
            "1": node("UNETLoader", unet_name=big_file, weight_dtype="default"),
            "q": node("FewBitsQuantizeINT8", model=["1", 0], format="int8_tensorwise"),
        }
        save(workflow, "cancelled", ("q", 0))
    before, asked = files(server), []

    def cancel(message):
        data = message["data"]
        if (
            message["type"] == "fewbits.progress"
            and data["done"] > 0.2 * data["total"]
            and not asked
        ):
            asked.append(time.monotonic())
            server.interrupt()

    run = server.run(workflow, on_message=cancel)
    seconds = time.monotonic() - asked[0]
    assert run.interrupted and run.error is None
    assert seconds < 5.0  # measured 2.1 with four processes on two cores
    assert files(server) == before
    queue = server.get("/queue")
    assert queue["queue_running"] == [] and queue["queue_pending"] == []
    after = convert("float8_e4m3fn", filename=f"after_cancel/{door}")
    assert server.run(after).status == "success"


def test_an_existing_file_is_kept_and_named_unless_overwriting_is_asked_for(server):
    def run(**inputs):
        return server.run(convert("int8_tensorwise", filename="existing/file", **inputs))

    target = server.output / "existing" / "file.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"mine")
    refused(
        run(),
        "q",
        "file.safetensors",
        "exists already",
        "choose another filename or turn overwrite on",
    )
    assert target.read_bytes() == b"mine"
    assert run(overwrite=True).status == "success"
    assert target.stat().st_size > 7e6
    workflow = {"1": node("UNETLoader", unet_name="emoji_flux.safetensors", weight_dtype="default")}
    refused(server.run(save(workflow, "existing/file", ("1", 0))), "save", "exists already")


@pytest.mark.parametrize("filename", ["a/../../escaped", "C:\\escaped"])
@pytest.mark.parametrize("door", ["file", "save"])
def test_a_name_outside_the_output_folder_is_refused(server, door, filename):
    if door == "file":
        workflow = convert("int8_tensorwise", filename=filename)
    else:
        workflow = {"1": node("UNETLoader", unet_name="emoji_flux.safetensors", weight_dtype="default"),
                    "q": node("FewBitsSaveComfyQuant", model=["1", 0], filename=filename)}  # fmt: skip
    refused(
        server.run(workflow), "q", "is not allowed", "write a name inside ComfyUI's output folder"
    )
    assert not list(server.base.rglob("escaped*"))


def test_an_input_outside_the_model_folders_is_refused(server):
    with pytest.raises(RuntimeError, match="Value not in list"):
        server.run(convert("int8_tensorwise", file="diffusion_models/../../secret.safetensors"))


def test_nan_in_a_weight_is_reported_by_name_by_both_doors_and_nothing_is_written(server, tmp_path):
    tensors = random_tensors(flux_shapes())
    tensors["single_blocks.0.linear1.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    server.add_model("diffusion_models", tmp_path / "nan.safetensors")
    before = files(server)
    told = (
        "nan.safetensors: tensor 'single_blocks.0.linear1.weight' has 1 NaN",
        "nothing was written",
    )
    refused(
        server.run(convert("int8_tensorwise", file="diffusion_models/nan.safetensors")), "q", *told
    )
    workflow = {"1": node("UNETLoader", unet_name="nan.safetensors", weight_dtype="default"),
                "q": node("FewBitsQuantizeINT8", model=["1", 0], format="int8_tensorwise")}  # fmt: skip
    refused(server.run(save(workflow, "nan/model", ("q", 0))), "q", *told)
    assert files(server) == before


def test_wishes_that_cannot_be_fulfilled_say_why(server):
    workflow = quantize_and_sample("FewBitsQuantizeINT8", block_size="64")
    refused(
        server.run(workflow),
        "quantize",
        "format int8_tensorwise has no option 'block_size'; it allows: scaling",
    )
    workflow = quantize_and_sample("FewBitsQuantizeINT8", keep="re:(")
    refused(server.run(workflow), "quantize", "pattern 're:(' is not a regular expression")
    workflow = quantize_and_sample("FewBitsQuantizeINT8", device="cuda")
    refused(server.run(workflow), "quantize", "ComfyUI runs on cpu; choose auto or cpu")
    workflow = quantize_and_sample("FewBitsQuantizeINT8")
    workflow["again"] = node("FewBitsQuantizeFP8", model=["quantize", 0], format="float8_e4m3fn")
    workflow["7"]["inputs"]["model"] = ["again", 0]
    refused(
        server.run(workflow),
        "again",
        "quantized already (int8_tensorwise, 22 layers)",
        "connect the original",
    )


def test_a_checkpoint_keeps_everything_but_its_diffusion_model(server, tmp_path):
    tensors = {
        f"model.diffusion_model.{name}": tensor for name, tensor in load_file(ORIGINAL).items()
    }
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.ones(4, 4, 3, 3)
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"title": "whole"})
    server.add_model("checkpoints", tmp_path / "whole.safetensors")
    run = server.run(convert("int8_tensorwise", file="checkpoints/whole.safetensors"))
    assert run.status == "success", run.error["exception_message"]
    written = server.output / "checkpoints" / "whole_int8_tensorwise.safetensors"
    with safe_open(written, "pt") as file:
        assert file.metadata()["title"] == "whole"
        assert len(json.loads(file.metadata()["_quantization_metadata"])["layers"]) == 22
    quantize_file(ORIGINAL, tmp_path / "inner.safetensors", Recipe(parse_wish("int8")))
    got = load_file(written)
    assert torch.equal(got.pop("first_stage_model.decoder.conv_in.weight"), torch.ones(4, 4, 3, 3))
    wanted = load_file(tmp_path / "inner.safetensors")
    assert {name.removeprefix("model.diffusion_model.") for name in got} == set(wanted)
    assert all(
        torch.equal(got[f"model.diffusion_model.{name}"], tensor) for name, tensor in wanted.items()
    )


def test_the_page_gets_help_translations_and_the_example_workflow(server):
    for name in IDS:
        for page in (f"{name}.md", f"{name}/zh.md"):
            assert server.request(f"/extensions/ComfyUI-FewBits/docs/{page}").startswith(b"# ")
    translations = server.get("/i18n")
    for language in ("en", "zh"):
        assert set(IDS) <= set(translations[language]["nodeDefs"])
    assert sorted(server.get("/workflow_templates")["ComfyUI-FewBits"]) == EXAMPLES
    for name in EXAMPLES:
        thumbnail = server.request(f"/api/workflow_templates/ComfyUI-FewBits/{quote(name)}.jpg")
        assert thumbnail.startswith(b"\xff\xd8\xff")


def test_the_example_workflow_runs_as_it_is(server, original):
    graph = json.loads(
        (PACK / "example_workflows" / "Quantize, sample and save.json").read_text(encoding="utf-8")
    )
    run = server.run(prompt_of(server, graph))
    assert ssim(picture(run), original) > SAME_PICTURE
    assert (server.output / "diffusion_models" / "emoji_flux_int8.safetensors").is_file()
