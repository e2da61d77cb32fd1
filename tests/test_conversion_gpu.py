"""Files converted on a GPU: the bytes of the CPU, whoever else uses the GPU meanwhile, and its memory given back."""

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = (
    "float8_e4m3fn",
    "int8_tensorwise",
    "int8_blockwise",
    "int8_lodewise",
    "bnb_nf4",
    "bnb_fp4:method=nearest",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Layers of many sizes one after the other, on both sides of the limits of the copies; zero blocks, biases."""
    generator = torch.Generator().manual_seed(0)
    rows = (64, 6144, 256, 10240, 128, 128, 8192, 512, 2048, 4096)
    tensors = {}
    for i, n in enumerate(rows):
        tensors[f"blocks.{i}.weight"] = (
            torch.randn(n, 4096, generator=generator).mul_(0.02).bfloat16()
        )
        tensors[f"blocks.{i}.bias"] = torch.randn(n, generator=generator).bfloat16()
    tensors["blocks.3.weight"][:128, 256:512] = 0
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(tensors, path)
    return path


def converted(model, wish, name, device):
    out = model.with_name(name)
    quantize_file(model, out, Recipe(parse_wish(wish)), device=device, overwrite=True)
    return out.read_bytes()


@pytest.mark.parametrize("wish", FORMATS)
def test_a_gpu_writes_the_files_of_the_cpu(model, wish):
    here = converted(model, wish, "here.safetensors", "cpu")
    for _ in range(3):
        assert converted(model, wish, "there.safetensors", "cuda") == here


def test_a_conversion_in_a_stream_of_the_callers_writes_the_same_file(model):
    here = converted(model, "int8_tensorwise", "here.safetensors", "cpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        assert converted(model, "int8_tensorwise", "there.safetensors", "cuda") == here


def test_a_conversion_gives_memory_of_the_gpu_back(model):
    converted(model, "bnb_nf4", "there.safetensors", "cuda")
    before = torch.cuda.memory_allocated()
    converted(model, "bnb_nf4", "there.safetensors", "cuda")
    assert torch.cuda.memory_allocated() == before
