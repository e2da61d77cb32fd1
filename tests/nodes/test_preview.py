"""What the page shows before a run: from a graph's values, without anything loaded or made."""

import pytest
from safetensors.torch import save_file

from support.helpers import clip_shapes, flux_shapes, random_tensors


@pytest.fixture
def flux(host, tmp_path):
    path = tmp_path / "models" / "diffusion_models" / "flux.safetensors"
    save_file(random_tensors(flux_shapes()), path)
    return path


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(**wish):
    return {
        "1": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
        "2": node("LoraLoaderModelOnly", model=["1", 0], lora_name="x", strength_model=1.0),
        "3": node("FewBitsQuantizeModel", model=["2", 0], **{"format": "bnb_nf4", **wish}),
    }


def preview(prompt, node_id="3"):
    from fewbits.nodes.preview import preview

    return preview(prompt, node_id)


def test_the_plan_is_that_of_the_run(flux, comfy, quantize):
    from fewbits.quant_ops.formats import FORMATS

    answer = preview(graph())
    model = comfy.sd.load_diffusion_model(str(flux))
    report = quantize(model, "bnb_nf4")[1]
    assert answer["plan"]["bytes_after"] == report.plan.bytes_after
    assert answer["sizes"]["bnb_nf4"] == report.plan.bytes_after
    assert set(answer["sizes"]) == set(FORMATS) and "target" not in answer


def test_rules_of_connected_nodes_count(flux):
    prompt = graph(recipe=["5", 0])
    prompt["4"] = node("FewBitsLayerRules", pattern="single_blocks.*")
    prompt["5"] = node("FewBitsLayerRules", recipe=["4", 0], pattern="double_blocks.0.*",
                       format="float8_e4m3fn")  # fmt: skip
    layers = {row["name"]: row["format"] for row in preview(prompt)["plan"]["layers"]}
    assert {f for name, f in layers.items() if name.startswith("single_blocks.")} == {None}
    assert "float8_e4m3fn" in {f for name, f in layers.items() if "double_blocks.0." in name}


def test_a_file_node_also_says_where_its_file_goes(flux, tmp_path):
    wish = {"file": "diffusion_models/flux.safetensors", "format": "nvfp4"}
    answer = preview({"3": node("FewBitsQuantizeFile", **wish)})
    path = "output/diffusion_models/flux_nvfp4.safetensors"
    assert answer["target"] == {"path": path, "exists": False, "overwrite": False}
    (tmp_path / path).touch()
    answer = preview({"3": node("FewBitsQuantizeFile", **wish, overwrite=True)})
    assert answer["target"] == {"path": path, "exists": True, "overwrite": True}
    converts = node("FewBitsConvertFP8Scaled", file="diffusion_models/flux.safetensors")
    path = "output/diffusion_models/flux_comfy_quant.safetensors"
    answer = preview({"3": converts})
    assert answer["target"]["path"] == path and answer["inspection"]["family"] == "Flux.1"


def test_a_file_that_is_quantized_already_is_planned_as_the_node_would_run_it(flux):
    from fewbits import quantize_file
    from fewbits.nodes.common import recipe_from
    from fewbits.quant_ops.errors import QuantError

    made = flux.with_name("flux_fp8.safetensors")
    quantize_file(flux, made, recipe_from(format="float8_e4m3fn"))
    wish = {"file": f"diffusion_models/{made.name}", "format": "int8_tensorwise"}
    with pytest.raises(QuantError, match="quantized already"):
        preview({"3": node("FewBitsQuantizeFile", **wish)})
    plan = preview({"3": node("FewBitsQuantizeFile", **wish, requantize=True)})["plan"]
    again = flux.with_name("again.safetensors")
    report = quantize_file(made, again, recipe_from(format=wish["format"]), requantize=True)
    assert plan["bytes_after"] == report.plan.bytes_after
    assert any("rounded a second time" in warning for warning in plan["warnings"])


def test_the_advisor_advises_before_it_runs(flux):
    from fewbits.nodes.format_advisor import FewBitsFormatAdvisor

    wish = {"file": "diffusion_models/flux.safetensors", "gpu": "RTX 4090 24GB"}
    advice = preview({"3": node("FewBitsFormatAdvisor", **wish)})["advice"]
    assert advice == FewBitsFormatAdvisor.execute(**wish).ui["fewbits_advice"][0]
    assert advice["gpu"]["name"].startswith("RTX 4090")


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({}, "a file of at most 50%"),
        ({"target": "1 kB"}, "a file of at most 1 kB"),
        ({"target": "0.02", "goal": "error"}, "an error of at most 0.02"),
    ],
)
def test_a_fit_says_what_it_was_asked_for(flux, wish, said):
    file = "diffusion_models/flux.safetensors"
    answer = preview({"3": node("FewBitsFitToSize", file=file, **wish)})
    assert answer["inspection"]["family"] == "Flux.1" and answer["asked"]["said"] == said
    whole = sum(size for _, size in answer["inspection"]["dtypes"].values())
    assert answer["asked"]["bytes"] == {"50%": whole // 2, "1 kB": 1000}.get(said[18:])


def test_a_size_that_is_none_is_refused_before_a_run(flux):
    from fewbits.quant_ops.errors import RecipeError

    file = "diffusion_models/flux.safetensors"
    for wish in ({"target": "large"}, {"goal": "beauty"}):
        with pytest.raises(RecipeError):
            preview({"3": node("FewBitsFitToSize", file=file, **wish)})


def test_what_the_page_may_set_are_the_inputs_own_values(comfy):
    from fewbits.nodes.bridge.routes import fitting_inputs
    from fewbits.nodes.quantize_file import FewBitsQuantizeFile

    inputs = {item.id: item for item in FewBitsQuantizeFile.define_schema().inputs}
    for format, fitting in fitting_inputs().items():
        for name, values in fitting.items():
            offered = getattr(inputs[name], "options", None) or ["true", "false"]
            assert set(values) <= set(offered), (format, name)
    assert set(fitting_inputs()["int8_tensorwise"]["convrot"]) == {"auto", "on", "off"}


def test_a_loader_shows_what_is_inside(flux):
    answer = preview({"3": node("FewBitsLoadModel", file="flux.safetensors")})
    assert answer["inspection"]["family"] == "Flux.1"


def test_a_node_that_saves_does_not_show_the_original_for_its_result(flux):
    prompt = graph()
    prompt["4"] = node("FewBitsSaveComfyQuant", model=["3", 0], filename="")
    assert list(preview(prompt, "4")) == ["target"]


@pytest.mark.parametrize("rules", [(), ("single_blocks.*", "float8_e4m3fn")], ids=["one", "two"])
def test_a_saved_file_gets_the_name_that_is_shown_before(flux, comfy, quantize, rules):
    from fewbits.nodes.bridge.model_io import automatic_name
    from fewbits.quant_ops.planning.recipe import Rule, Wish

    prompt = graph()
    prompt["4"] = node("FewBitsSaveComfyQuant", model=["3", 0], overwrite=True)
    if rules:
        prompt["5"] = node("FewBitsLayerRules", pattern=rules[0], format=rules[1])
        prompt["3"]["inputs"]["recipe"] = ["5", 0]
    shown = preview(prompt, "4")["target"]
    made = (Rule(rules[0], Wish(rules[1])),) if rules else ()
    model = comfy.sd.load_diffusion_model(str(flux))
    quantized, _ = quantize(model, "bnb_nf4", rules=made)
    assert shown["path"] == f"output/{automatic_name(quantized)}.safetensors"
    prompt["4"]["inputs"]["filename"] = "a/b"
    assert preview(prompt, "4")["target"]["path"] == "output/a/b.safetensors"


def test_a_model_that_no_node_quantized_has_no_name_yet(flux):
    prompt = {"1": node("UNETLoader", unet_name="flux.safetensors")}
    prompt["4"] = node("FewBitsSaveComfyQuant", model=["1", 0], filename="")
    assert preview(prompt, "4") == {}


def test_the_advisors_recipe_is_planned_before_it_runs(flux):
    file = "diffusion_models/flux.safetensors"
    prompt = {
        "1": node("FewBitsFormatAdvisor", file=file, gpu="RTX 4090 24GB"),
        "3": node("FewBitsQuantizeFile", file=file, format="nvfp4", recipe=["1", 1]),
    }
    best = preview(prompt, "1")["advice"]["best"]
    formats = {row["format"] for row in preview(prompt)["plan"]["layers"] if row["format"]}
    assert formats == {best.partition(":")[0]}


def test_a_recipe_that_goes_in_circles_shows_nothing(flux):
    file = "diffusion_models/flux.safetensors"
    prompt = {
        "1": node("FewBitsFormatAdvisor", file=file, recipe=["2", 0]),
        "2": node("FewBitsLayerRules", pattern="a", recipe=["1", 1]),
        "3": node("FewBitsQuantizeFile", file=file, format="nvfp4", recipe=["1", 1]),
    }
    assert preview(prompt) == preview(prompt, "1") == {}


@pytest.fixture
def encoders(host, tmp_path):
    for name in ("a", "b"):
        path = tmp_path / "models" / "text_encoders" / f"{name}.safetensors"
        save_file(random_tensors(clip_shapes()), path)
    return path


def test_text_encoders_show_what_is_inside_and_how_large_they_get(encoders):
    loader = node("FewBitsLoadTextEncoder", file="a.safetensors", file2="none", type="flux")
    prompt = {"1": loader, "3": node("FewBitsQuantizeTextEncoder", clip=["1", 0], format="bnb_nf4")}
    assert preview(prompt, "1")["inspection"]["name"] == "a.safetensors"
    answer = preview(prompt)
    assert (
        answer["plan"]["bytes_after"] == answer["sizes"]["bnb_nf4"] < answer["plan"]["bytes_before"]
    )
    assert answer["plan"]["layers"] == []  # a CLIP has other names for them
    prompt["3"]["inputs"]["keep"] = "text_model.*"
    assert preview(prompt) == {}
    prompt["3"]["inputs"]["keep"], loader["inputs"]["file2"] = "", "b.safetensors"
    assert [found["name"] for found in preview(prompt, "1")["inspection"]] == [
        "a.safetensors", "b.safetensors"
    ]  # fmt: skip
    assert preview(prompt) == {}


@pytest.mark.parametrize(
    "prompt",
    [
        {},
        {"3": None},
        {"3": node("FewBitsQuantizeModel", format="nvfp4")},
        {"3": node("FewBitsQuantizeModel", format="nvfp4", model=["3", 0])},
        {"3": node("FewBitsQuantizeModel", format="nvfp4", model=["9", 0])},
    ],
    ids=["no node", "no inputs", "not connected", "a loop", "a missing node"],
)
def test_a_graph_that_does_not_say_enough_shows_nothing(host, prompt):
    assert preview(prompt) == {}


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "", "none.safetensors"]
)
def test_only_files_of_the_model_folders_are_opened(host, tmp_path, name):
    from fewbits.quant_ops.errors import CheckpointError

    (tmp_path / "secret.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="no such file in ComfyUI's model folders"):
        preview({"3": node("FewBitsLoadModel", file=name)})


def test_a_wish_that_cannot_be_fulfilled_says_why(flux):
    from fewbits.quant_ops.errors import RecipeError

    with pytest.raises(RecipeError, match="has no option 'block_size'"):
        preview(graph(format="int8_tensorwise", block_size="64"))
