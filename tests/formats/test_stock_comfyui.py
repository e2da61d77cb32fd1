"""Native formats in ComfyUI without the pack: every layer it loads is the one the reference decodes."""

import json
from pathlib import Path

import numpy as np
import pytest

from fewbits.quant_ops import reference
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import version_key
from support.harness.server import start
from support.helpers import flux_shapes, tiny_checkpoint

pytestmark = pytest.mark.slow  # a ComfyUI of its own loads ten files
WISHES = {
    "fp8 e4m3fn": "float8_e4m3fn",
    "fp8 e5m2": "float8_e5m2",
    "int8 row": "int8_tensorwise",
    "int8 tensor": "int8_tensorwise:scaling=tensor",
    "int8 rotated": "int8_tensorwise:convrot=true,convrot_groupsize=64",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
    "w4a4": "convrot_w4a4:convrot_groupsize=64",
    "w4a4 with int8 activations": "convrot_w4a4:convrot_groupsize=64,linear_dtype=int8",
    "w4a8": "asym_w4a8_int8:convrot_groupsize=64",
}

# Loads every file of a folder as the stock loader does; saves what each layer dequantizes to in float32, or the error.
LOAD = """
import pathlib, sys
tree, folder = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, tree)
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, numpy, torch
from comfy_kitchen.tensor import QuantizedTensor
for source in pathlib.Path(folder).glob("*.safetensors"):
    try:
        model = comfy.sd.load_diffusion_model(str(source)).model.diffusion_model
    except Exception as error:
        source.with_suffix(".txt").write_text(str(error), encoding="utf-8")
        continue
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    weights = {name: getattr(weight, "data", weight) for name, weight in weights.items()}
    decoded = {name: weight.to(torch.float32).dequantize().numpy() for name, weight in weights.items()
               if isinstance(weight, QuantizedTensor)}
    numpy.savez(source.with_suffix(".npz"), **decoded)
assert "fewbits" not in sys.modules
"""


def too_old(comfyui: Path, wish: str) -> bool:
    scope: dict = {}
    exec((comfyui / "comfyui_version.py").read_text(encoding="utf-8"), scope)
    return version_key(scope["__version__"]) < version_key(
        get_format(wish.partition(":")[0]).min_comfyui
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("original") / "flux.safetensors", flux_shapes(128)
    )


@pytest.fixture(scope="module")
def opened(comfyui, original, tmp_path_factory) -> Path:
    """A folder of files, each with what ComfyUI made of it beside it."""
    folder = tmp_path_factory.mktemp("written")
    for label, wish in WISHES.items():
        quantize_file(original, folder / f"{label}.safetensors", Recipe(parse_wish(wish)))
    program, log = folder / "load.py", folder / "load.log"
    program.write_text(LOAD, encoding="utf-8")
    process = start([str(program), str(comfyui), str(folder)], folder=folder, log=log)
    assert process.wait(600) == 0, log.read_text(encoding="utf-8")[-2000:]
    return folder


@pytest.mark.parametrize("label", WISHES)
def test_comfyui_decodes_what_the_reference_decodes_or_is_too_old_and_says_so(
    comfyui, opened, label
):
    refusal = opened / f"{label}.txt"
    if too_old(comfyui, WISHES[label]):
        assert WISHES[label].partition(":")[0] in refusal.read_text(encoding="utf-8")
        return
    assert not refusal.exists(), refusal.read_text(encoding="utf-8")
    loaded, expected = (
        np.load(opened / f"{label}.npz"),
        reference.decode_file(opened / f"{label}.safetensors"),
    )
    assert set(loaded.files) == set(expected)
    assert len(expected) > 10
    for name, truth in expected.items():
        assert np.abs(loaded[name] - truth).max() <= 1e-6 * np.abs(truth).max(), name


def test_the_header_of_a_native_file_says_so(tmp_path):
    target = tmp_path / "quantized.safetensors"
    quantize_file(
        tiny_checkpoint(tmp_path / "flux.safetensors"), target, Recipe(parse_wish("nvfp4"))
    )
    data = target.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    layers = json.loads(header["__metadata__"]["_quantization_metadata"])
    assert layers["format_version"] == "1.0"
    assert header["__metadata__"]["fewbits.min_comfyui"] == "0.8.0"
    assert header["__metadata__"]["fewbits.requires_pack"] == "false"
    assert {f"{name}.comfy_quant" for name in layers["layers"]} <= set(header)
