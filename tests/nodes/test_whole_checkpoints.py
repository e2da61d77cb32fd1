"""Whole checkpoints of several models, small: the file door, both loaders, and what CheckpointSave makes of them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import inspect_file, quantize_file, verify_file
from fewbits.quant_ops.errors import UnsupportedLayerError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects
from support.helpers import clip_shapes, random_tensors, t5_shapes
from support.tiny_models import build, forward, recognised_as_small

pytestmark = pytest.mark.slow  # four seconds each

MODEL = "model.diffusion_model."
T5 = random_tensors(t5_shapes(1, 64, 128))
VAE = random_tensors({"decoder.conv_in.weight": (32, 4, 3, 3), "encoder.conv_in.weight": (32, 3, 3, 3), "decoder.mid.attn_1.q.weight": (32, 32)})  # fmt: skip
# class -> what stands beside it, and a format for it; stock opens the first two and none of the others
CASES = {
    "AuraFlow": ("text_encoders.pile_t5xl.transformer.", "vae.", "int8_tensorwise"),
    "Flux": ("text_encoders.t5xxl.transformer.", "vae.", "float8_e4m3fn"),
    "LTXV": ("text_encoders.t5xxl.transformer.", "vae.", "bnb_nf4"),
    "SDXL": ("text_encoders.other.transformer.", "first_stage_model.", "int8_blockwise"),
}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_its_model_quantized_and_the_rest_as_it_was(comfy, stock, name, tmp_path):
    encoder, vae, wish = CASES[name]
    tiny = build(name)
    bare = {key.removeprefix(MODEL): tensor for key, tensor in tiny.tensors.items()}
    beside = under(encoder, T5) | under(vae, VAE)
    alone, whole = tmp_path / "alone.safetensors", tmp_path / "whole.safetensors"
    save_file(bare, alone, tiny.metadata)
    save_file(under(MODEL, bare) | beside, whole, tiny.metadata)
    recipe = Recipe(parse_wish(wish))
    made = [tmp_path / f"{path.stem}_made.safetensors" for path in (alone, whole)]
    plans = [quantize_file(*paths, recipe).plan for paths in zip((alone, whole), made, strict=True)]
    assert plans[0].loads_in() == plans[1].loads_in() and verify_file(made[1]).ok
    tensors = load_file(made[1])
    expected = under(MODEL, load_file(made[0])) | beside
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(bits(tensor), bits(expected[key])) for key, tensor in tensors.items())
    with recognised_as_small(name):
        model = comfy.sd.load_checkpoint_guess_config(
            str(made[1]), output_vae=False, output_clip=False
        )[0]
        one = comfy.sd.load_diffusion_model(str(made[0]))
    output = forward(model, name)
    assert type(model.model.model_config).__name__ == name
    assert torch.equal(output, forward(one, name))
    answer = stock.ask("checkpoint", path=str(made[1]), name=name)
    if plans[1].requires_pack:
        assert "error" in answer or answer["class"] is None
    else:
        assert answer["class"] == name and torch.allclose(
            answer["output"], output, atol=1e-4, rtol=1e-3
        )


def test_an_encoder_under_openclips_names_is_refused_quantized(comfy, tmp_path):
    """ComfyUI renames its weights and not their scales: it took codes for weights."""
    import comfy.supported_models

    names = {
        "transformer.resblocks.0.mlp.c_fc": (64, 16),
        "transformer.resblocks.0.mlp.c_proj": (16, 64),
    }
    prefix = "conditioner.embedders.1.model."
    tensors = {f"{prefix}token_embedding.weight": torch.zeros(32, 16)}
    for name, shape in names.items():
        stored, marker = dialects.native("int8_tensorwise", torch.randn(shape))
        tensors |= dialects.under(prefix + name, stored, marker)
    path = tmp_path / "file.safetensors"
    save_file(tensors, path)
    (found,) = [text for text in inspect_file(path).findings if "foreign-names" in text]
    assert "OpenCLIP-named text encoder" in found and not verify_file(path).ok
    config = comfy.supported_models.SDXL({})
    with pytest.raises(UnsupportedLayerError, match="quantized under OpenCLIP's names"):
        config.process_clip_state_dict(dict(tensors))


def test_a_quantized_clip_g_is_not_saved_under_openclips_names(comfy):
    """q, k and v were put together as codes, without their scales."""
    import comfy.supported_models

    config = comfy.supported_models.SDXL({})
    tensors = under("clip_g.transformer.", random_tensors(clip_shapes(1, 128)))
    assert any(
        "in_proj_weight" in name
        for name in config.process_clip_state_dict_for_saving(dict(tensors))
    )
    base = "clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    stored, marker = dialects.native("int8_tensorwise", tensors[f"{base}.weight"].float())
    tensors |= dialects.under(base, stored, marker)
    with pytest.raises(
        UnsupportedLayerError, match="under OpenCLIP's names.*save the quantized|CLIPSave"
    ):
        config.process_clip_state_dict_for_saving(tensors)
