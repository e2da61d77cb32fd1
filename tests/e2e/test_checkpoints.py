"""One file with diffusion model, CLIP-L and VAE, each part quantized or not: both loaders, sampled, saved, reloaded."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, Rule, parse_wish
from support.harness import EMOJI
from support.harness.metrics import psnr
from support.helpers import clip_shapes, random_tensors, sd3_shapes

CLIP = "text_encoders.clip_l.transformer."
# What the file holds, and the least PSNR of the picture against the unquantized checkpoint's. Measured on this random
# model (torch 2.11, CPU): 60.0, 63.7, 48.1 and 48.5 dB.
CASES = {
    "int8_tensorwise": ("int8_tensorwise", "int8_tensorwise", 54),
    "int8_blockwise model": ("int8_blockwise", None, 57),
    "nf4 text encoder": (None, "bnb_nf4", 42),
    "nf4": ("bnb_nf4", "bnb_nf4", 42),
}


@pytest.fixture(scope="module")
def original(server, tmp_path_factory):
    """A random SD3 of depth 2 with a CLIP-L of real size and the emoji model's VAE."""
    shapes = sd3_shapes() | {
        "context_embedder.weight": (128, 4096),
        "y_embedder.mlp.0.weight": (128, 2048),
    }
    parts = {
        "model.diffusion_model.": random_tensors(shapes),
        CLIP: random_tensors(clip_shapes()),
        "first_stage_model.": load_file(EMOJI / "emoji_vae.safetensors"),
    }
    tensors = {
        f"{prefix}{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()
    }
    path = tmp_path_factory.mktemp("checkpoint") / "all_parts.safetensors"
    save_file(tensors, path)
    server.add_model("checkpoints", path)
    return path


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def draw(server, loader, **more):
    """A picture with all three parts of a checkpoint: text -> latent -> picture."""
    run = server.run({
        "c": loader,
        "text": node("CLIPTextEncode", clip=["c", 1], text="a lighthouse at dawn"),
        "latent": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "sample": node(
            "KSampler", model=["c", 0], positive=["text", 0], negative=["text", 0], latent_image=["latent", 0], seed=1,
            steps=4, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["c", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="checkpoint"),
        **more,
    })  # fmt: skip
    assert run.status == "success", run.error
    return run


@pytest.fixture(scope="module")
def wanted(server, original):
    """The picture of the checkpoint as it is."""
    return draw(server, node("CheckpointLoaderSimple", ckpt_name=original.name)).images()[0]


def converted(original, folder, model, clip):
    """The command's file: the model by the primary wish, the text encoder by a rule."""
    path = folder / "all_parts_quantized.safetensors"
    rules = (Rule(f"{CLIP}text_model.encoder.*", parse_wish(clip)),) if clip else ()
    if model is None:
        rules = (*rules, Rule("*", None))
    report = quantize_file(
        original, path, Recipe(parse_wish(model or "int8_tensorwise"), rules=rules)
    )
    return path, report


@pytest.mark.parametrize("case", CASES)
def test_both_loaders_open_all_three_parts_and_draw_nearly_the_same(
    server, original, wanted, tmp_path, case
):
    model, clip, least = CASES[case]
    path, report = converted(original, tmp_path, model, clip)
    quantized = {name for name in (model, clip) if name}
    assert {layer.format for layer in report.plan.layers if layer.format} == quantized
    server.add_model("checkpoints", path)
    (got,) = draw(server, node("CheckpointLoaderSimple", ckpt_name=path.name)).images()
    run = draw(server, node("FewBitsLoadCheckpoint", file=path.name))
    assert run.images()[0].tobytes() == got.tobytes()
    assert set(run.history["outputs"]["c"]["fewbits_inspection"][0]["formats"]) == quantized
    quality = psnr(got, wanted)
    print(
        f"{case}: PSNR {quality:.1f} dB, {path.stat().st_size / original.stat().st_size:.2f} of the size"
    )
    assert least < quality


def test_parts_quantized_in_the_graph_are_saved_as_one_checkpoint_that_draws_the_same(
    server, original
):
    nodes = {
        "qm": node("FewBitsQuantizeINT8", model=["c", 0], format="int8_blockwise"),
        "qc": node("FewBitsQuantizeTextEncoder", clip=["c", 1], format="bnb_nf4"),
        "out": node("CheckpointSave", model=["qm", 0], clip=["qc", 0], vae=["c", 2], filename_prefix="checkpoints/parts"),
    }  # fmt: skip
    workflow_loader = node("CheckpointLoaderSimple", ckpt_name=original.name)
    nodes["text"] = node("CLIPTextEncode", clip=["qc", 0], text="a lighthouse at dawn")
    nodes["sample"] = node(
        "KSampler", model=["qm", 0], positive=["text", 0], negative=["text", 0], latent_image=["latent", 0], seed=1,
        steps=4, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    wanted = draw(server, workflow_loader, **nodes).images()[0]
    (path,) = (server.output / "checkpoints").glob("parts*.safetensors")
    for loader in ("CheckpointLoaderSimple", "FewBitsLoadCheckpoint"):
        key = "ckpt_name" if loader.startswith("Check") else "file"
        got = draw(server, node(loader, **{key: path.name})).images()[0]
        assert psnr(got, wanted) is None or psnr(got, wanted) > 50
    state = load_file(path)
    assert torch.uint8 in {
        tensor.dtype for name, tensor in state.items() if name.endswith("fc1.weight")
    }
