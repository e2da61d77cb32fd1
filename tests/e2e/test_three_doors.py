"""One pipeline, three doors, equal bytes: the nodes on a MODEL, the node on a file, and the command."""

import hashlib

import pytest

from support.harness import EMOJI
from support.helpers import fewbits, sd3_shapes, tiny_checkpoint

KEEP = ["*_mod.lin", r"re:joint_blocks\.0\..*"]
CASES = [
    pytest.param("emoji_flux", "FewBitsQuantizeFP8", "float8_e4m3fn", {}, [], id="fp8"),
    pytest.param("emoji_flux", "FewBitsQuantizeINT8", "int8_tensorwise", {}, [], id="int8_row"),
    pytest.param("emoji_flux", "FewBitsQuantizeFP4", "bnb_fp4", {}, [], id="fp4_own_method"),
    pytest.param(
        "emoji_flux",
        "FewBitsQuantizeFP4",
        "bnb_fp4",
        {"method": "nearest"},
        ["--method", "nearest"],
        id="fp4",
    ),
    pytest.param(
        "doors_sd3",
        "FewBitsQuantizeINT8",
        "int8_blockwise",
        {"block_size": "64"},
        [],
        id="int8_block",
    ),
    pytest.param(
        "doors_sd3",
        "FewBitsQuantizeINT8",
        "int8_tensorwise",
        {
            "scaling": "tensor",
            "preset": "none",
            "keep": "\n".join(KEEP),
            "fallback": "float8_e4m3fn",
        },
        ["--preset", "none", "--keep", KEEP[0], "--keep", KEEP[1], "--fallback", "float8_e4m3fn"],
        id="options",
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The trained Flux model, and a random SD3 model with metadata of its own."""
    folder = tmp_path_factory.mktemp("models")
    return [
        EMOJI / "emoji_flux.safetensors",
        tiny_checkpoint(folder / "doors_sd3.safetensors", sd3_shapes(), title="tiny"),
    ]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("stem, node, name, inputs, arguments", CASES)
def test_three_doors_write_the_same_bytes(
    server, models, tmp_path, stem, node, name, inputs, arguments, request
):
    model = next(path for path in models if path.stem == stem)
    server.add_model("diffusion_models", model)
    case = f"doors/{request.node.callspec.id}"
    wish = {"format": name, **inputs}
    run = server.run(
        {
            "load": {
                "class_type": "UNETLoader",
                "inputs": {"unet_name": model.name, "weight_dtype": "default"},
            },
            "quantize": {"class_type": node, "inputs": {"model": ["load", 0], **wish}},
            "save": {
                "class_type": "FewBitsSaveComfyQuant",
                "inputs": {"model": ["quantize", 0], "filename": f"{case}/model"},
            },
            "file": {
                "class_type": "FewBitsQuantizeFile",
                "inputs": {
                    "file": f"diffusion_models/{model.name}",
                    "filename": f"{case}/file",
                    **wish,
                },
            },
        }
    )
    assert run.status == "success", run.error
    stated = {key: inputs[key] for key in ("scaling", "block_size") if key in inputs}
    if name == "int8_tensorwise":
        stated["convrot"] = "auto"  # the nodes' own default; the full name alone means plain rows
    options = ",".join(f"{key}={value}" for key, value in stated.items())
    wish_text = f"{name}:{options}" if options else name
    command = tmp_path / "command.safetensors"
    result = fewbits("quantize", model, "-o", command, "--format", wish_text, *arguments)
    assert result.returncode == 0, result.stderr
    assert digest(server.output / case / "file.safetensors") == digest(command)
    assert digest(server.output / case / "model.safetensors") == digest(command)
