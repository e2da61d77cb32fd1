"""Files that are no models: refused by what they are, whatever names their kind has."""

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops.doors import inspect_file, quantize_file
from fewbits.quant_ops.errors import SourceError
from fewbits.quant_ops.planning.model_family import families, find_parts
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

INT8 = Recipe(parse_wish("int8"))
# Files with names of diffusers are converted or refused elsewhere: nodes/test_diffusers_names.py.
REFUSED = [
    family
    for family in families()
    if family.kind == "refuse" and not family.name.startswith("diffusers_")
]


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: f"{family.name}-{family.keys[0]}")
@pytest.mark.parametrize("prefix", ["", "some.part."])
def test_every_set_of_names_is_refused_by_its_kind(tmp_path, family, prefix):
    path = tmp_path / "file.safetensors"
    save_file({prefix + key: torch.ones(32, 32) for key in family.keys}, path)
    with pytest.raises(SourceError, match=f"this is an? {family.title} file: ") as refused:
        quantize_file(path, tmp_path / "out.safetensors", INT8)
    assert family.why in str(refused.value)
    assert inspect_file(path).family == family.title
    assert not (tmp_path / "out.safetensors").exists()


LAYERS = [f"double_blocks.{index}.img_mlp.0" for index in range(3)]


@pytest.mark.parametrize("pair", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_a_lora_is_refused_however_many_layers_it_has(tmp_path, pair):
    tensors = {
        f"lora_unet_{layer}.{side}.weight": torch.ones(64, 64) for layer in LAYERS for side in pair
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(SourceError, match="this is a LoRA file"):
        quantize_file(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", INT8)


# How ComfyUI's adapters, and those of other tools, name the two sides of a layer.
SIDES = [
    ("to_q_lora.up.weight", "to_q_lora.down.weight"),
    ("to_q.lora_linear_layer.up.weight", "to_q.lora_linear_layer.down.weight"),
    ("processor.qkv_lora1.up.weight", "processor.qkv_lora1.down.weight"),
    ("to_q.lora_B", "to_q.lora_A"),
    ("to_q.lora_B.my_adapter.weight", "to_q.lora_A.my_adapter.weight"),
]


@pytest.mark.parametrize("sides", SIDES, ids=lambda sides: sides[0])
def test_a_lora_is_told_by_most_of_its_names(sides):
    names = [f"blocks.{at}.attn.{side}" for at in range(3) for side in sides]
    alphas = [f"blocks.{at}.attn.alpha" for at in range(3)]
    assert {part.family.name for part in find_parts(names + alphas)} == {"lora"}
    model = [f"blocks.{at}.attn.to_{name}.weight" for at in range(9) for name in "qkv"]
    assert not find_parts(names + model)


@pytest.mark.parametrize("ending", ["diff", "diff_b", "oft_diag"])
def test_whole_differences_to_weights_are_a_lora_too(ending):
    names = [f"diffusion_model.blocks.{at}.self_attn.q.{ending}" for at in range(9)]
    assert {part.family.name for part in find_parts(names)} == {"lora"}


def test_inside_a_model_the_same_names_are_the_models_own():
    """Tokenizers and embedders of some models are named like a VAE or an upscaler."""
    flux = next(family for family in families() if family.name == "flux")
    names = [*flux.keys, "conv_first.weight", "inner.decoder.conv_in.weight"]
    assert [part.family.name for part in find_parts(names)] == ["flux"]
    beside = find_parts(
        [
            *(f"model.diffusion_model.{key}" for key in flux.keys),
            "vae.decoder.conv_in.weight",
            "vae.encoder.conv_in.weight",
        ]
    )
    assert {part.family.name for part in beside} == {"flux", "vae"}


def test_a_controlnet_that_copies_a_models_blocks_is_no_model():
    flux = ["single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"]
    own = ["controlnet_blocks.0.weight", "controlnet_x_embedder.weight"]
    assert [part.family.name for part in find_parts(flux)] == ["diffusers_flux"]
    assert [part.family.name for part in find_parts(flux + own)] == ["controlnet"]


MODELS = {family.keys: family for family in families() if family.kind == "diffusion"}
CONTROLS = ["controlnet_blocks.0.weight", "input_hint_block.0.weight", "after_proj_list.18.bias"]


@pytest.mark.parametrize("family", MODELS.values(), ids=lambda family: family.name)
def test_a_controlnet_is_none_even_where_it_holds_all_names_of_a_model(family):
    for name in CONTROLS:
        extra = ["zero_convs.0.0.weight"] if name.startswith("input") else []
        parts = find_parts([*family.keys, name, *extra])
        assert [part.family.name for part in parts if not part.prefix] == ["controlnet"]


def test_a_detectors_language_model_is_no_text_encoder():
    detector = next(family for family in families() if family.name == "detector")
    bert = [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.embeddings.word_embeddings.weight",
    ]
    assert [part.family.name for part in find_parts([*detector.keys, *bert])] == ["detector"]
    assert [part.family.name for part in find_parts(bert)] == ["bert"]


def test_a_vae_of_diffusers_is_no_unet(tmp_path):
    halves = [f"{half}.mid_block.resnets.0.norm1.weight" for half in ("encoder", "decoder")]
    names = [*halves, "encoder.down_blocks.0.resnets.0.norm1.weight", "encoder.conv_in.weight"]
    path = tmp_path / "vae.safetensors"
    save_file({name: torch.ones(32, 32) for name in names}, path)
    assert inspect_file(path).family == "VAE"
    with pytest.raises(SourceError, match="this is a VAE file"):
        quantize_file(path, tmp_path / "out.safetensors", INT8)
