"""Products made ready for more calls give what the kernels give that they are made of."""

import pytest
import torch

from fewbits.quant_ops.bench import quantized_layer
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.layouts import native
from fewbits.quant_ops.layouts.product import _AT, Product, multiply_at
from fewbits.quant_ops.planning.recipe import parse_wish
from fewbits.quant_ops.spec import LayerInput

WISHES = (
    "int8_tensorwise", "int8_tensorwise:scaling=tensor", "int8_tensorwise:convrot=true", "float8_e4m3fn",
    "float8_e4m3fn_rowwise", "int8_blockwise", "int8_lodewise", "bnb_nf4", "bnb_fp4", "nvfp4", "mxfp8", "asym_w4a8_int8",
)  # fmt: skip
ROWS = "TensorWiseINT8Layout", ("weight_scale",)
NATIVE = {  # those of ComfyUI: layout, side tensors on disk, columns rotated together
    "int8_tensorwise": (*ROWS, 0),
    "int8_tensorwise:scaling=tensor": (*ROWS, 0),
    "int8_tensorwise:convrot=true": (*ROWS, 256),
    "float8_e4m3fn": ("TensorCoreFP8Layout", ("weight_scale",), 0),
    "nvfp4": ("TensorCoreNVFP4Layout", ("weight_scale", "weight_scale_2"), 0),
    "mxfp8": ("TensorCoreMXFP8Layout", ("weight_scale",), 0),
}
N, K = 3072, 3072  # as large as what the tables choose kernels for


@pytest.fixture(scope="module", params=WISHES)
def product(request):
    wish = parse_wish(request.param)
    format = get_format(wish.format)
    options, layer = wish.options, LayerInput((N, K), "BF16")
    weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16) / K**0.5
    stored = {name: part.cuda() for name, part in quantized_layer(format, weight, options).items()}
    if found := format.product(stored, layer, options):
        return Product(stored["weight"], (N, K), *found)
    layout, sides, span = NATIVE[request.param]
    call = native.LAYOUTS[layout].call([stored["weight"], *(stored[s] for s in sides)], span)
    return Product(stored["weight"], (N, K), *call)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 17, 64, 700, 2100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_gives_the_same_at_every_call_and_for_every_shape(product, rows, with_bias):
    bias = torch.randn(N, device="cuda").bfloat16() if with_bias else None
    for _ in range(2):
        x = torch.randn(1, rows, K, device="cuda").bfloat16()
        x[0, 0, :8] *= 40  # a few strong channels
        wanted = product.op(x[0], *product.arguments, bias)
        got = product(x, bias)
        assert got.shape == (1, rows, N) and got.is_contiguous()
        error = (got[0].float() - wanted.float()).norm() / wanted.float().norm()
        # One rounds x times 127 / absmax, the other x / (absmax / 127): of codes of bf16 .065 % are a
        # step apart, measured 1.0e-3
        assert error < 2e-3
        assert torch.equal(product(x[0], bias), got[0])
        apart = torch.empty(rows, K + 8, device="cuda", dtype=torch.bfloat16)[:, 8:]
        apart.copy_(x[0])
        assert torch.equal(product(apart, bias), got[0])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 700])
def test_a_weight_that_comes_anew_at_each_call_is_multiplied_alike(rows):
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, device="cuda")
    scale, x = torch.rand(N, device="cuda"), torch.randn(rows, K, device="cuda").bfloat16()
    call = "TensorWiseINT8Layout", N, K, 0, None
    first = multiply_at(x, [codes, scale], *call)
    known = len(_AT)
    assert known and torch.equal(multiply_at(x, [codes.view(N, K), scale.view(N)], *call), first)
    assert len(_AT) == known
    codes.neg_()  # the bytes at those addresses count
    assert torch.equal(multiply_at(x, [codes, scale], *call), -first)
