"""ComfyUI in this process, on the CPU, with tiny models: what the nodes do, without a server."""

import gc
import sys

import pytest
import torch
from safetensors.torch import save_file

from support.harness.first_word import hasten
from support.helpers import flux_shapes, random_tensors, sd3_shapes
from support.stock import Stock

SHAPES = {"sd3": sd3_shapes, "flux": flux_shapes}


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui):
    """ComfyUI's package `comfy`, with FewBits registered."""
    hasten()
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = (
        True  # what `--cpu` sets; read when comfy.model_management is imported
    )
    import comfy.sd

    gc.freeze()  # collecting MODELs, which are cycles, then takes half a second less
    import fewbits.nodes.bridge

    fewbits.nodes.bridge.register()
    assert [reason for reason in fewbits.nodes.bridge.status().values() if reason] == []
    return comfy


@pytest.fixture(scope="session")
def stock(comfyui, tmp_path_factory):
    """A ComfyUI without the pack, in a process of its own."""
    with Stock(comfyui, tmp_path_factory.mktemp("stock")) as running:
        yield running


@pytest.fixture(autouse=True)
def inference_mode():
    """ComfyUI runs every node inside it."""
    with torch.inference_mode():
        yield


@pytest.fixture
def family():
    """Tests that care name both: `@pytest.mark.parametrize("family", ["sd3", "flux"])`."""
    return "flux"


@pytest.fixture
def model_file(tmp_path, family):
    """A random bf16 file in shuffled order, with metadata of its own."""
    tensors = random_tensors(SHAPES[family]())
    path = tmp_path / f"{family}.safetensors"
    save_file(tensors, path, metadata={"modelspec.title": f"tiny {family}", "format": "pt"})
    return path


@pytest.fixture
def model(comfy, model_file):
    return comfy.sd.load_diffusion_model(str(model_file))


@pytest.fixture
def sample(comfy):
    """Two Euler steps from fixed noise: a MODEL -> latent."""
    import comfy.sample

    def run(model, width=768, batch=1):
        generator = torch.Generator().manual_seed(1)
        context, pooled, noise = (
            torch.randn(shape, generator=generator)
            for shape in ((1, 8, width), (1, width), (batch, 16, 8, 8))
        )
        positive = [[context, {"pooled_output": pooled}]]
        return comfy.sample.sample(
            model,
            noise,
            2,
            1.0,
            "euler",
            "simple",
            positive,
            positive,
            torch.zeros_like(noise),
            seed=0,
            disable_pbar=True,
        )

    return run


@pytest.fixture
def quantize(comfy):
    """The node's core call: `quantize(model, "int8_tensorwise")` -> (MODEL, report)."""
    from fewbits.nodes.bridge.model_io import quantize_model
    from fewbits.quant_ops.pipeline import ignore_progress
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    def run(model, wish="int8_tensorwise", **recipe):
        recipe = Recipe(primary=parse_wish(wish), **recipe)
        return quantize_model(
            model, recipe, device="cpu", on_plan=lambda plan: None, on_progress=ignore_progress
        )

    return run


@pytest.fixture
def save(comfy):
    """The Save node's core call: MODEL, path -> report."""
    from fewbits.nodes.bridge.model_io import save_model
    from fewbits.quant_ops.checkpoint.writer import FileSink

    return lambda model, path: save_model(model, FileSink(path), on_plan=lambda plan: None)


@pytest.fixture
def host(comfy, tmp_path, monkeypatch):
    """The bridge's module, with ComfyUI's folders below tmp_path."""
    import folder_paths

    from fewbits.nodes.bridge import host

    models, output = tmp_path / "models", tmp_path / "output"
    places = {
        "diffusion_models": ["diffusion_models", "unet"],
        "text_encoders": ["text_encoders", "clip"],
    }
    for folder in host.MODEL_FOLDERS:
        paths = [models / name for name in places.get(folder, [folder])]
        paths.append(output / places.get(folder, [folder])[-1 if folder == "text_encoders" else 0])
        for path in paths:
            path.mkdir(parents=True)
        known = (list(map(str, paths)), {".safetensors", ".pt"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, known)
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return host


SMALL_CLIP = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2,
              "projection_dim": 128}  # fmt: skip


@pytest.fixture
def small_clip(comfy, monkeypatch):
    """Every CLIP-L that ComfyUI builds has 2 layers of width 128 here, so that a file takes milliseconds."""
    import comfy.sd1_clip

    original = comfy.sd1_clip.SDClipModel.__init__

    def __init__(self, *args, model_options=None, **kwargs):
        layers = 3 if kwargs.get("layer") == "hidden" else 2  # SD3 takes the last layer but one
        config = {**SMALL_CLIP, "num_hidden_layers": layers}
        original(
            self,
            *args,
            model_options={**(model_options or {}), "clip_l_model_config": config},
            **kwargs,
        )

    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "__init__", __init__)


@pytest.fixture
def quantize_clip(comfy):
    """The CLIP node's core call: `quantize_clip(clip, "bnb_nf4")` -> (CLIP, report)."""
    from fewbits.nodes.bridge import clip_io
    from fewbits.quant_ops.pipeline import ignore_progress
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    def run(clip, wish="float8_e4m3fn", kernels=False, calibration=None, **recipe):
        recipe = Recipe(primary=parse_wish(wish), **recipe)
        return clip_io.quantize_clip(
            clip,
            recipe,
            kernels=kernels,
            device="cpu",
            calibration=calibration,
            on_plan=lambda plan: None,
            on_progress=ignore_progress,
        )

    return run


@pytest.fixture
def encode():
    """Conditioning and pooled output of a text, as one vector."""

    def run(clip, text="a red panda on a bicycle"):
        cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        return torch.cat([part.flatten() for part in (cond, pooled) if part is not None])

    return run
