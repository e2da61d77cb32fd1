"""docs/api.md: its script as it stands there, and what else it promises."""

import os
import re
import subprocess
import sys

import pytest

from support.harness import PACK

PAGE = (PACK / "docs" / "api.md").read_text(encoding="utf-8")
FILE = "diffusion_models/emoji_flux.safetensors"


@pytest.fixture
def script(server, tmp_path):
    """Run the page's script against the server with these arguments."""
    (text,) = re.findall(r"^```py\n(.*?)^```$", PAGE, re.M | re.S)
    path = tmp_path / "quantize_over_http.py"
    path.write_text(text, encoding="utf-8")
    variables = {**os.environ, "COMFYUI": f"http://127.0.0.1:{server.port}", "NO_PROXY": "*"}

    def run(*arguments):
        command = [sys.executable, str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)

    return run


def test_the_script_of_the_page_quantizes_and_says_where_the_file_is(script, server):
    result = script(FILE, "int8_tensorwise")
    assert result.returncode == 0, result.stderr
    assert (
        "written: output/diffusion_models/emoji_flux_int8_tensorwise.safetensors" in result.stdout
    )
    assert "load it: Load Diffusion Model emoji_flux_int8_tensorwise.safetensors" in result.stdout
    assert (server.output / "diffusion_models/emoji_flux_int8_tensorwise.safetensors").is_file()


def test_a_refusal_reaches_the_script(script):
    result = script(FILE, "int9")
    assert result.returncode != 0 and "written" not in result.stdout


def test_history_carries_what_the_page_promises(server):
    inputs = {"file": FILE, "format": "bnb_nf4", "overwrite": True}
    run = server.run({"1": {"class_type": "FewBitsQuantizeFile", "inputs": inputs}})
    (report,) = run.history["outputs"]["1"]["fewbits_report"]
    named = PAGE.split("- `fewbits_report`")[1].split("- `fewbits_inspection`")[0]
    promised = set(re.findall(r"^  - (.*?):", named, re.M))
    assert promised and set(re.findall(r"`(\w+)`", " ".join(promised))) - set(report) == set()
    assert report["output"] == str(
        server.output / "diffusion_models/emoji_flux_bnb_nf4.safetensors"
    )
    assert {"fewbits.plan", "fewbits.progress"} <= {message["type"] for message in run.messages}
    assert server.get("/fewbits/running")["1"]["bytes_after"] == report["bytes_after"]
    assert "block_size" not in server.get("/fewbits/formats")["int8_tensorwise"]


def test_a_result_from_the_cache_is_in_the_history_again(server):
    prompt = {
        "1": {"class_type": "FewBitsLoadModel", "inputs": {"file": "emoji_flux.safetensors"}},
        "2": {"class_type": "FewBitsQuantizeModel",
              "inputs": {"model": ["1", 0], "format": "mxfp8"}},
        "3": {"class_type": "FewBitsSaveRecipe", "inputs": {"report": ["2", 1]}},
    }  # fmt: skip
    first = server.run(prompt).history["outputs"]["2"]["fewbits_report"][0]
    again = server.run(prompt).history["outputs"]["2"]["fewbits_report"][0]
    assert again == first


@pytest.mark.parametrize("format", ["mxfp8", "asym_w4a8_int8", "convrot_w4a4"])
def test_quantize_model_makes_what_no_other_node_of_the_graph_does(server, format):
    prompt = {
        "1": {"class_type": "UNETLoader",
              "inputs": {"unet_name": "emoji_flux.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "FewBitsQuantizeModel",
              "inputs": {"model": ["1", 0], "format": format}},
        "3": {"class_type": "FewBitsSaveComfyQuant",
              "inputs": {"model": ["2", 0], "overwrite": True}},
    }  # fmt: skip
    run = server.run(prompt)
    assert run.status == "success", run.error
    (report,) = run.history["outputs"]["3"]["fewbits_report"]
    assert report["saved"]["name"].startswith(f"emoji_flux_{format}")
    assert format in {row["format"] for row in report["summary"]}


def test_a_wish_that_does_not_fit_is_refused_before_the_model_is_loaded(server):
    prompt = {
        "1": {"class_type": "UNETLoader",
              "inputs": {"unet_name": "emoji_flux.safetensors", "weight_dtype": "fp8_e4m3fn"}},
        "2": {"class_type": "FewBitsQuantizeINT8",
              "inputs": {"model": ["1", 0], "format": "int8_tensorwise", "block_size": "64"}},
        "3": {"class_type": "FewBitsSaveComfyQuant", "inputs": {"model": ["2", 0]}},
    }  # fmt: skip
    run = server.run(prompt)
    assert (
        run.error["node_id"] == "2"
        and "has no option 'block_size'" in run.error["exception_message"]
    )
    assert "1" not in run.error["executed"]
