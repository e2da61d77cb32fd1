"""Which encoder a file holds: `inspect` says its width and what it fits, and a wrong one is refused with both widths."""

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops.doors import inspect_file, quantize_file
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.model_family import families
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.helpers import clip_shapes, random_tensors

FAMILIES = {family.name: family for family in families() if family.sizes}
# (family, width) -> the kind that ComfyUI takes it for, and what it looks at beside the width
KINDS = {
    ("qwen3_text", 1024): "QWEN3_06B",
    ("qwen3_text", 2048): "QWEN3_2B",
    ("qwen3_text", 2560): "QWEN3_4B",
    ("qwen3_text", 4096): "QWEN3_8B",
    ("mistral", 3072): "MINISTRAL_3_3B",
    ("mistral", 4096): "LLAMA3_8",
    ("mistral", 5120): "MISTRAL3_24B_PRUNED_FLUX2",
    ("gemma", 2304): "GEMMA_2_2B",
    ("qwen3_vl_text", 2560): "QWEN3VL_4B",
    ("qwen3_vl_text", 4096): "QWEN3VL_8B",
}
BESIDE = {("gemma", 2304): []}


def state(family, rows):
    """The keys that the family is known by, and the tensor that says its width."""
    names = {*family.keys, family.width}
    return {
        name: torch.zeros(rows, 1) if name == family.width else torch.zeros(1) for name in names
    }


@pytest.mark.parametrize("case", KINDS, ids=lambda case: f"{case[0]} {case[1]}")
def test_comfyui_takes_these_widths_for_these_encoders(comfy, case):
    family, rows = FAMILIES[case[0]], case[1]
    kind = comfy.sd.detect_te_model(state(family, rows))
    assert kind == getattr(comfy.sd.TEModel, KINDS[case])
    assert rows in dict(family.sizes)


def test_the_sizes_of_gemma_and_qwen_are_those_of_comfyuis_configurations(comfy):
    import comfy.text_encoders.llama as llama

    for name, family, size in (
        ("Gemma2_2B_Config", "gemma", "Gemma 2 2B"),
        ("Gemma3_4B_Config", "gemma", "Gemma 3 4B"),
        ("Gemma3_12B_Config", "gemma", "Gemma 3 12B"),
        ("Qwen25_3BConfig", "qwen2_text", "3B"),
        ("Qwen25_7BVLI_Config", "qwen2_text", "7B"),
        ("Qwen3_4BConfig", "qwen3_text", "4B"),
        ("Qwen3_8BConfig", "qwen3_text", "8B"),
        ("Mistral3Small24BConfig", "mistral", "Mistral Small 24B"),
    ):
        width = getattr(llama, name)().hidden_size
        assert dict(FAMILIES[family].sizes)[width].partition(":")[0] == size


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (2560, "(width 2560, 4B: Z-Image, Flux.2 klein 4B)"),
        (4096, "(width 4096, 8B: Flux.2 klein 9B, Ideogram 4)"),
        (3000, "(width 3000; ComfyUI builds 1024, 2048, 2560, 4096)"),
    ],
)
def test_inspect_says_the_width_and_what_it_fits(tmp_path, rows, words):
    save_file(state(FAMILIES["qwen3_text"], rows), tmp_path / "te.safetensors")
    assert inspect_file(tmp_path / "te.safetensors").family == f"Qwen3 encoder {words}"


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
def test_an_encoder_of_another_width_is_refused_with_both(comfy, small_clip, tmp_path, quantized):
    from fewbits.nodes.bridge import clip_io

    path = tmp_path / "wide.safetensors"
    save_file(random_tensors(clip_shapes(2, 256)), path)
    if quantized:
        plain, path = path, tmp_path / "int8.safetensors"
        quantize_file(plain, path, Recipe(parse_wish("int8")))
    with pytest.raises(
        CheckpointError, match=r"is \[.*256.*\] in the file, \[.*128.*\] in the"
    ) as error:
        clip_io.load_files([str(path)], "stable_diffusion", on_cpu=True, kernels=False)
    assert len(str(error.value).splitlines()) == 1
    if quantized:  # through ComfyUI's own loader too
        with pytest.raises(CheckpointError, match="weights do not fit the text encoder"):
            comfy.sd.load_clip([str(path)])
