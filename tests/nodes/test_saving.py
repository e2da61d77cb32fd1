"""ComfyUI's own ModelSave, CLIPSave and CheckpointSave with quantized parts, opened again by its own loaders."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import inspect_file, verify_file
from support.helpers import EMOJI, clip_shapes, random_tensors, sd3_shapes

pytestmark = pytest.mark.slow  # models saved, opened and run

WISHES = pytest.mark.parametrize(
    "wish", ["int8_tensorwise", "float8_e4m3fn", "bnb_nf4", "nvfp4", "int8_blockwise"]
)
LORA = EMOJI.with_name("emoji_lora_blue.safetensors")


@pytest.fixture
def saved(host, tmp_path):
    """Run one of ComfyUI's save nodes and return the files it wrote."""

    def run(name, *args):
        import comfy_extras.nodes_model_merging as nodes

        node = getattr(nodes, name)()
        node.output_dir = str(tmp_path / "output")
        node.save(*args)
        return sorted((tmp_path / "output").rglob("*.safetensors"))

    return run


@pytest.fixture
def clip(comfy, small_clip, tmp_path):
    save_file(random_tensors(clip_shapes(2, 128)), tmp_path / "clip.safetensors")
    return comfy.sd.load_clip([str(tmp_path / "clip.safetensors")])


def checkpoint():
    """SD3 with CLIP-L and a VAE in one file."""
    shapes = sd3_shapes() | {
        "context_embedder.weight": (128, 4096),
        "y_embedder.mlp.0.weight": (128, 2048),
    }
    parts = {
        "model.diffusion_model.": random_tensors(shapes),
        "text_encoders.clip_l.transformer.": random_tensors(clip_shapes(3, 128)),
        "first_stage_model.": load_file(EMOJI.with_name("emoji_vae.safetensors")),
    }
    return {
        f"{prefix}{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()
    }


@WISHES
@pytest.mark.parametrize("lora", [0.0, 1.0])
def test_a_saved_model_holds_the_same_bytes_and_samples_to_the_same_latent(
    comfy, quantize, sample, saved, wish, lora, monkeypatch
):
    model, _ = quantize(comfy.sd.load_diffusion_model(str(EMOJI)), wish)
    if lora:  # what runs beside the weights is rounded into those that are saved
        monkeypatch.setenv("FEWBITS_LORA", "bake")
        model, _ = comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(str(LORA)), lora, 0
        )
    wanted = sample(model, 256)
    (path,) = saved("ModelSave", model, "diffusion_models/model")
    assert verify_file(path).ok and inspect_file(path).findings == ()
    again = comfy.sd.load_diffusion_model(str(path))
    running = model.model.diffusion_model.state_dict()
    for name, tensor in again.model.diffusion_model.state_dict().items():
        assert torch.equal(tensor, running[name]), name
    # Weights mapped from a file are aligned differently, and torch then adds in another order: measured 1.4e-6. Where
    # activations are rounded too, a flipped code grows with every layer: measured 0.024.
    rounded = wish.startswith("int8")
    assert float((sample(again, 256) - wanted).norm() / wanted.norm()) < (0.06 if rounded else 1e-4)


@WISHES
@pytest.mark.parametrize("kernels", [False, True])
def test_a_saved_clip_encodes_the_same(comfy, clip, quantize_clip, encode, saved, wish, kernels):
    small, _ = quantize_clip(clip, wish, kernels)
    wanted = encode(small)
    (path,) = saved("CLIPSave", small, "clip/small")
    again = comfy.sd.load_clip([str(path)])
    if kernels:  # they are a choice of the node, not of the file
        from fewbits.nodes.bridge.clip_io import with_kernels

        again = with_kernels(again)
    assert torch.equal(encode(again), wanted)


def test_a_saved_clip_has_the_bytes_of_the_file_door(clip, quantize_clip, saved, tmp_path):
    from fewbits.quant_ops.doors import quantize_file
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    quantize_file(
        tmp_path / "clip.safetensors", tmp_path / "door.safetensors", Recipe(parse_wish("bnb_nf4"))
    )
    (path,) = saved("CLIPSave", quantize_clip(clip, "bnb_nf4")[0], "clip/small")
    got, wanted = load_file(path), load_file(tmp_path / "door.safetensors")
    assert set(wanted) <= set(got)
    layers = [name.removesuffix("absmax") for name in wanted if name.endswith("absmax")]
    assert len(layers) == 12
    for name, tensor in wanted.items():
        if name.startswith(tuple(layers)) and not name.endswith("bias"):
            assert torch.equal(got[name], tensor), name


def test_a_saved_clip_with_a_lora_holds_it(comfy, clip, quantize_clip, encode, saved):
    small, _ = quantize_clip(clip, "int8_tensorwise")
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    small.add_patches(
        {key: ("diff", (torch.randn(512, 128, generator=torch.Generator().manual_seed(5)) * 0.02,))}
    )
    wanted = encode(small)
    (path,) = saved("CLIPSave", small, "clip/small")
    assert torch.equal(encode(comfy.sd.load_clip([str(path)])), wanted)


def test_a_checkpoint_of_quantized_parts_is_saved_and_opened_whole(
    comfy, small_clip, quantize, quantize_clip, encode, saved, tmp_path
):
    """SD3 with its own CLIP-L and a VAE; all three go into one file and come out as they were."""
    save_file(checkpoint(), tmp_path / "plain.safetensors")
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "plain.safetensors"))
    model, clip = quantize(model, "int8_blockwise")[0], quantize_clip(clip, "bnb_nf4")[0]
    (file,) = saved("CheckpointSave", model, clip, vae, "checkpoints/whole")
    again = comfy.sd.load_checkpoint_guess_config(str(file))
    state, wanted = (
        again[0].model.diffusion_model.state_dict(),
        model.model.diffusion_model.state_dict(),
    )
    assert set(state) == set(wanted) and all(
        torch.equal(state[name], tensor) for name, tensor in wanted.items()
    )
    assert torch.equal(encode(again[1]), encode(clip))
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[2].decode(latent), vae.decode(latent))
