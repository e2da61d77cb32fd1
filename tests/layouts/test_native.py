"""Products of weights in comfy-kitchen's own layouts: what ours compute, and where they are taken."""

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from fewbits.kernels import choice
from fewbits.kernels.device import CLASSES
from fewbits.quant_ops.layouts import native, product_of

CASES = {
    "int8 tensor": ("TensorWiseINT8Layout", {}),
    "int8 rows": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8 ConvRot 256": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "int8 ConvRot 64": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
    ),
    "fp8": ("TensorCoreFP8Layout", {"scale": "recalculate"}),
    "nvfp4": ("TensorCoreNVFP4Layout", {"scale": "recalculate"}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
}


def weight_of(name: str, shape: tuple[int, int] = (64, 512)) -> QuantizedTensor:
    layout, options = CASES[name]
    weight = torch.randn(shape, dtype=torch.bfloat16) / shape[1] ** 0.5
    return QuantizedTensor.from_float(weight, layout, **options)


@pytest.mark.parametrize("name", CASES)
def test_our_product_is_that_of_the_decoded_weight_but_for_rounding_x(name):
    weight, x = weight_of(name), torch.randn(5, 512, dtype=torch.bfloat16)
    found = native.taken(weight)
    op, arguments = found.call(found.pieces(weight), native.span_of(weight._params))
    got, bias = op(x, *arguments, None).float(), torch.randn(64).bfloat16()
    truth = x.float() @ weight.dequantize().float().t()
    error = (got - truth).norm() / truth.norm()
    # bf16 weights and outputs, and 8 bits of x where the format rounds it
    assert error < (0.05 if name == "fp8" else 0.02)
    assert torch.allclose(op(x, *arguments, bias).float(), got + bias.float(), atol=0.1)


def test_padded_and_transposed_weights_stay_comfy_kitchens():
    assert native.taken(weight_of("nvfp4", (64, 520))) is None
    assert native.native_product(weight_of("int8 rows").t()) is None


def test_comfy_kitchen_multiplies_where_nothing_was_measured(monkeypatch):
    weight = weight_of("int8 rows")
    assert product_of(weight) is None  # no GPU
    for sm, gpu in CLASSES.items():
        monkeypatch.setattr(native, "gpu_of", lambda tensor, gpu=gpu: gpu)
        assert (product_of(weight) is not None) == (sm == "sm_90")
        assert choice.beats_kitchen("int8", gpu) == (sm == "sm_90")


def test_one_variable_switches_our_products_of_native_weights_off(monkeypatch):
    monkeypatch.setattr(native, "gpu_of", lambda tensor: CLASSES["sm_90"])
    weight = weight_of("int8 rows")
    assert product_of(weight) is not None
    monkeypatch.setenv(native.OFF, "0")
    assert product_of(weight) is None


def test_rows_of_another_length_are_refused_and_not_read_as_more_or_fewer():
    """A product that was made ready knows addresses: it would read on."""
    weight = weight_of("int8 rows")
    found = native.taken(weight)
    pieces = found.pieces(weight)
    product = native.PRODUCTS[weight._layout_cls](weight._layout_cls, pieces, 64, 512, 0)
    product(torch.randn(2, 512), None)
    for multiply in (
        lambda x: product(x, None),
        lambda x: native.multiply_at(x, pieces, weight._layout_cls, 64, 512, 0, None),
    ):
        with pytest.raises(RuntimeError, match=r"x is \[4, 256\].*weight of 64x512"):
            multiply(torch.randn(4, 256))
