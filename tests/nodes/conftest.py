"""ComfyUI in this process, on the CPU, with tiny models: what the nodes do, without a server."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from helpers import flux_shapes, random_tensors, sd3_shapes

SHAPES = {"sd3": sd3_shapes, "flux": flux_shapes}


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui):
    """ComfyUI's package `comfy`, with FewBits registered."""
    sys.path.insert(0, str(comfyui))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # what `--cpu` sets; read when comfy.model_management is imported
    import comfy.sd

    import fewbits.nodes.bridge

    fewbits.nodes.bridge.register()
    assert [reason for reason in fewbits.nodes.bridge.status().values() if reason] == []
    return comfy


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

    def run(model, width=768):
        generator = torch.Generator().manual_seed(1)
        context, pooled, noise = (
            torch.randn(shape, generator=generator) for shape in ((1, 8, width), (1, width), (1, 16, 8, 8))
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
        return quantize_model(model, recipe, device="cpu", on_plan=lambda plan: None, on_progress=ignore_progress)

    return run


@pytest.fixture
def save(comfy):
    """The Save node's core call: MODEL, path -> report."""
    from fewbits.nodes.bridge.model_io import save_model
    from fewbits.quant_ops.checkpoint.writer import FileSink

    return lambda model, path: save_model(model, FileSink(path), on_plan=lambda plan: None)
