"""Whether a layer of ours rounds its input: as the file, and ComfyUI for text encoders, want it."""

import json

import pytest
import torch

from fewbits.quant_ops.bench import quantized_layer
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.spec import LayerInput


def output(comfy, full_precision_mm, marked, name="int8_blockwise"):
    """(what a loaded layer gives, what its decoded weight gives)"""
    format = get_format(name)
    options = format.configure({"full_precision_matrix_mult": marked})
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    stored = quantized_layer(format, weight, options)
    marker = json.dumps(format.marker(LayerInput((128, 256), "F32"), options)).encode()
    state = {**stored, "comfy_quant": torch.frombuffer(bytearray(marker), dtype=torch.uint8)}
    ops = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=full_precision_mm)
    layer = ops.Linear(256, 128, bias=False, device="cpu", dtype=torch.float32)
    layer.load_state_dict(state)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return layer(x), x @ format.dequantize(stored, LayerInput((128, 256), None), options).t()


@pytest.mark.parametrize(
    ("full_precision_mm", "marked"), [(True, False), (False, True)], ids=["text encoder", "marker"]
)
@pytest.mark.parametrize("name", ["int8_blockwise", "int8_tensorwise", "convrot_w4a4"])
def test_full_precision_leaves_the_input_as_it_is(comfy, full_precision_mm, marked, name):
    got, expected = output(comfy, full_precision_mm, marked, name)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_a_diffusion_model_rounds_the_input_of_its_layers(comfy):
    got, expected = output(comfy, False, False)
    assert 1e-3 < (got - expected).norm() / expected.norm() < 0.02
