"""A layer leaves ComfyUI's casts out where they have nothing to do, and only there."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fewbits.quant_ops.bench import quantized_layer
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.spec import LayerInput

FORMATS = ["int8_blockwise", "bnb_nf4", "float8_e4m3fn_rowwise"]


@pytest.fixture(params=FORMATS)
def layer(comfy, request):
    format = get_format(request.param)
    options = format.configure({})
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    marker = json.dumps(format.marker(LayerInput((128, 256), "F32"), options)).encode()
    state = {**quantized_layer(format, weight, options), "bias": torch.randn(128)}
    state["comfy_quant"] = torch.frombuffer(bytearray(marker), dtype=torch.uint8)
    layer = comfy.ops.mixed_precision_ops({}, torch.float32).Linear(
        256, 128, device="cpu", dtype=torch.float32
    )
    layer.load_state_dict(state)
    return layer


class Cast(Exception):
    """ComfyUI was asked to move or change a weight."""


@pytest.fixture
def no_cast(comfy, monkeypatch):
    def refuse(*args, **kwargs):
        raise Cast

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", refuse)


X = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1))


def multiplied(layer, x):
    return torch.nn.functional.linear(x, layer.weight, layer.bias.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_where_its_input_is_needs_no_cast_and_gives_the_same_bits(layer, no_cast, dtype):
    x = X.to(dtype)
    assert torch.equal(layer(x), multiplied(layer, x)) and torch.equal(
        layer(x[0, 0]), multiplied(layer, x[0, 0])
    )


def test_what_a_lora_or_an_option_changes_goes_through_comfyui(layer):
    decoded = torch.nn.functional.linear(X, layer.weight.dequantize(), layer.bias)
    layer.weight_function = [lambda weight: weight + 1]
    assert torch.allclose(layer(X), decoded + X.sum(-1, keepdim=True), atol=1e-3)
    layer.weight_function, layer.bias_function = [], [lambda bias: bias + 1]
    assert torch.allclose(layer(X), multiplied(layer, X) + 1, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["weight_function", "bias_function", "comfy_force_cast_weights", "_v"]
)
def test_nothing_is_left_out_where_comfyui_has_something_to_do(layer, no_cast, name):
    setattr(layer, name, [lambda tensor: tensor])
    with pytest.raises(Cast):
        layer(X)
    delattr(layer, name)
    assert torch.equal(layer(X), multiplied(layer, X))


def test_a_weight_or_bias_elsewhere_is_moved_by_comfyui(layer, no_cast):
    with pytest.raises(Cast):
        layer(X.to("meta"))
    layer.bias = torch.nn.Parameter(layer.bias.to("meta"), requires_grad=False)
    with pytest.raises(Cast):
        layer(X)


def test_a_replaced_weight_is_used_at_once(layer, no_cast):
    first = layer(X)
    layer.set_weight(-layer.weight.dequantize())
    assert torch.equal(layer(X), multiplied(layer, X)) and (layer(X) - first).norm() > first.norm()


def test_an_interrupt_stops_the_next_layer(comfy, layer):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        layer(X)
    layer(X)


def test_counters_see_a_linear_and_gradients_reach_the_input(layer):
    seen = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    wanted = layer(X)
    with Listen():
        assert torch.equal(layer(X), wanted)
    assert "aten.linear.default" in seen
    with FlopCounterMode(display=False):
        assert torch.equal(layer(X), wanted)
    with torch.inference_mode(False), torch.enable_grad():
        x = X.clone().requires_grad_()
        layer(x).sum().backward()
        assert torch.allclose(x.grad, layer.weight.dequantize().sum(0).expand_as(x), atol=1e-4)
