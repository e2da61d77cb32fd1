"""The contract of our runtime tensors: every operation ComfyUI performs on a weight, for every format and odd shapes."""

import copy
import dataclasses

import pytest
import torch
from comfy_kitchen.tensor.base import QuantizedTensor, get_layout_class

from fewbits.quant_ops.errors import UnsupportedLayerError
from fewbits.quant_ops.formats import FORMATS, get_format
from fewbits.quant_ops.layouts import linear, register_layout

WISHES = [
    (name, {}) for name in FORMATS if name not in ("mxfp8", "nvfp4")
]  # those are always ComfyUI's own
WISHES += [("int8_tensorwise", {"convrot": True, "convrot_groupsize": 16}), ("int8_tensorwise", {"scaling": "tensor"}),
           ("int8_blockwise", {"block_size": 16}), ("bnb_nf4", {"block_size": 32})]  # fmt: skip
SHAPES = [(1, 1), (17, 129), (64, 256), (256, 64), (0, 64)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


@pytest.fixture(params=WISHES, ids=lambda wish: "-".join([wish[0], *map(str, wish[1].values())]))
def layout(request):
    name, options = request.param
    return register_layout(name, get_format(name).configure(options))


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def weight(request):
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0)) / 8


def quantized(weight, layout, **kwargs):
    return QuantizedTensor.from_float(weight, layout, **kwargs)


def tensors_of(qt):
    params = qt._params
    return [qt._qdata, *(getattr(params, field) for field in params._tensor_fields())]


def close(a, b, dtype=torch.float32):
    scale = b.float().abs().amax().item() if b.numel() else 0.0
    return (a.float() - b.float()).abs().amax().item() <= {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * (scale + 1e-6) if b.numel() else a.shape == b.shape  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_keeps_shape_dtype_and_most_of_its_value(layout, weight, dtype):
    qt = quantized(weight.to(dtype), layout)
    values = qt.dequantize()
    assert (qt.shape, qt.dtype) == (weight.shape, dtype) and (values.shape, values.dtype) == (
        weight.shape,
        dtype,
    )
    assert (values.float() - weight).norm() <= 0.2 * weight.norm() + 1e-6


def test_a_change_of_dtype_keeps_the_codes(layout, weight):
    qt = quantized(weight, layout)
    half = qt.to(torch.bfloat16)
    assert isinstance(half, QuantizedTensor) and half.dtype == torch.bfloat16
    assert all(
        torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)
        for a, b in zip(tensors_of(qt), tensors_of(half))
    )


def test_every_tensor_follows_the_device(layout, weight):
    moved = quantized(weight, layout).to(device="meta")
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}


def test_detach_and_parameter_share_storage_and_stay_quantized(layout, weight):
    qt = quantized(weight, layout)
    parameter = torch.nn.Parameter(qt, requires_grad=False)
    assert isinstance(parameter, QuantizedTensor) and isinstance(parameter, torch.nn.Parameter)
    assert parameter._qdata.data_ptr() == qt._qdata.data_ptr() == qt.detach()._qdata.data_ptr()


def test_a_clone_is_independent_and_copy_brings_it_back(layout, weight):
    qt = quantized(weight, layout)
    clone = qt.clone()
    other = quantized(-weight, layout)
    clone.copy_(other)
    assert torch.equal(clone.dequantize(), other.dequantize())
    assert close(qt.dequantize(), quantized(weight, layout).dequantize())
    with pytest.raises(TypeError):
        clone.copy_(weight)


def test_empty_like_is_quantized_too(layout, weight):
    like = torch.empty_like(quantized(weight, layout))
    assert isinstance(like, QuantizedTensor) and like.shape == weight.shape


def rounds_activations(layout):
    """The largest error of an activation in units of its token's absmax; 0 where the layout leaves it alone."""
    cls = get_layout_class(layout)
    rounds = getattr(cls.FORMAT, "multiplies_codes", lambda options: False)(cls.OPTIONS)
    return (
        {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4}[cls.FORMAT.levels.dtype]
        if rounds
        else 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_takes_any_leading_dimensions_dtype_and_bias(layout, weight, dtype):
    n, k = weight.shape
    for mode in MODES:
        with mode():
            qt = quantized(weight, layout).to(torch.bfloat16)
            plain = quantized(weight, layout).dequantize()
            bias = torch.randn(n)
            for leading, b in (((), None), ((3,), bias), ((2, 1, 3), bias)):
                x = torch.randn(*leading, k).to(dtype)
                out = torch.nn.functional.linear(x, qt, b)
                expected = torch.nn.functional.linear(x.float(), plain, b)
                assert (out.shape, out.dtype) == ((*leading, n), dtype)
                terms = torch.nn.functional.linear(
                    x.float().abs(), plain.abs(), None if b is None else b.abs()
                )
                step = 2 * torch.finfo(dtype).eps
                allowed = 2 * step * terms + 1e-6  # weight, bias and result rounded
                if rounding := rounds_activations(layout):
                    allowed = allowed + rounding * x.float().abs().amax(
                        -1, keepdim=True
                    ) * plain.abs().sum(1)
                assert ((out.float() - expected).abs() <= allowed).all()


def test_our_linear_gives_the_bits_of_torchs_and_gradients_where_they_are_recorded(layout, weight):
    qt = quantized(weight, layout)
    x, bias = torch.randn(2, 3, weight.shape[1]), torch.randn(weight.shape[0])
    wanted = torch.nn.functional.linear(x, qt, bias)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(linear(x, qt, bias), wanted)
            assert torch.equal(
                linear(x.half(), qt, bias), torch.nn.functional.linear(x.half(), qt, bias)
            )
    with torch.no_grad():
        assert torch.equal(linear(x, qt.t().t(), bias), wanted)
        assert torch.equal(
            linear(weight.t()[None], qt.t(), None),
            torch.nn.functional.linear(weight.t()[None], qt.t()),
        )
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    x.requires_grad_()
    linear(x, qt, bias).sum().backward()
    assert close(x.grad, qt.dequantize().sum(0).expand_as(x))


def product_of(weight):
    return weight._params.prepared.product


def test_what_a_product_needs_is_made_once_and_never_outlives_its_weight(layout, weight):
    with torch.no_grad():
        qt, x = quantized(weight, layout), torch.randn(3, weight.shape[1])
        result = lambda w: linear(x, w, None)  # noqa: E731
        first, made = result(qt), product_of(qt)
        assert torch.equal(result(qt), first) and product_of(qt) is made is not None
        for other in (qt.detach(), qt.clone(), qt.to(torch.float16), qt.to(device="meta")):
            assert product_of(other) is None
        assert copy.deepcopy(qt._params).prepared.product is None

        negated = quantized(-weight, layout)
        wanted = result(negated)
        changed = qt.clone()
        result(changed)
        changed.copy_(negated)  # same tensors, other bytes
        assert torch.equal(result(changed), wanted)
        changed = qt.clone()
        result(changed)
        changed._qdata, changed._params = negated._qdata.clone(), negated._params.clone()
        assert torch.equal(result(changed), wanted)
        changed = qt.clone()
        result(changed)
        changed._qdata = (
            qt._qdata.clone()
        )  # the same side tensors, so the same `product` to look at
        assert torch.equal(result(changed), first) and product_of(changed).qdata is changed._qdata


def test_mm_addmm_and_quantized_inputs_agree_with_plain_values(layout, weight):
    qt, plain = quantized(weight, layout), quantized(weight, layout).dequantize()
    x = torch.randn(5, weight.shape[1])
    allowed = 1e-4 + rounds_activations(layout) * x.abs().amax(1, keepdim=True) * plain.abs().sum(1)
    assert ((torch.mm(x, qt.t()) - x @ plain.t()).abs() <= allowed).all()
    bias = torch.randn(weight.shape[0])
    assert ((torch.addmm(bias, x, qt.t()) - torch.addmm(bias, x, plain.t())).abs() <= allowed).all()
    halves = torch.addmm(bias, x, qt.t(), alpha=0.5)
    assert torch.allclose(halves, torch.addmm(bias, x, plain.t(), alpha=0.5), rtol=1e-4, atol=1e-4)
    if weight.shape[0]:
        assert close(torch.nn.functional.linear(qt, qt), plain @ plain.t())


def test_transposing_moves_the_scales_or_dequantizes(layout, weight):
    qt, plain = quantized(weight, layout), quantized(weight, layout).dequantize()
    assert torch.equal(qt.t().dequantize(), plain.t())
    assert torch.equal(qt.t().t().dequantize(), plain)
    assert torch.equal(
        torch.as_tensor(
            qt.transpose(0, 1).clone()
            if not isinstance(qt.transpose(0, 1), QuantizedTensor)
            else qt.transpose(0, 1).dequantize()
        ),
        plain.t(),
    )


def test_what_is_done_to_a_transposed_weight_has_the_right_values(layout, weight):
    for mode in MODES:
        with mode():
            qt, plain = quantized(weight, layout).t(), quantized(weight, layout).dequantize().t()
            for copied in (
                qt.clone(),
                qt.contiguous(),
                qt.detach(),
                qt.to(torch.float32, copy=True),
                qt.T.T,
            ):
                assert torch.equal(
                    copied.dequantize() if isinstance(copied, QuantizedTensor) else copied, plain
                )
            for again in (
                lambda w: w.flatten(),
                lambda w: w.reshape(-1),
                lambda w: w[:1],
                lambda w: w.unsqueeze(0),
                torch.abs,
            ):
                assert torch.equal(again(qt), again(plain))
            x = torch.randn(2, 3, plain.shape[0])
            rounded = (
                rounds_activations(layout) * x.abs().amax(-1, keepdim=True) * plain.abs().sum(0)
            )
            assert ((x @ qt - x @ plain).abs() <= 1e-4 + rounded).all()
            bias = torch.randn(plain.shape[1])
            whole = torch.addmm(bias, x[0], qt, beta=0.5) - torch.addmm(bias, x[0], plain, beta=0.5)
            assert whole.abs().amax() <= 1e-4 if whole.numel() else True


def test_views_and_slices_have_the_right_values(layout, weight):
    qt, plain = quantized(weight, layout), quantized(weight, layout).dequantize()
    assert torch.equal(qt.reshape(-1), plain.reshape(-1)) and torch.equal(
        qt.contiguous().dequantize(), plain
    )
    assert all(torch.equal(a, b) for a, b in zip(qt.chunk(2), plain.chunk(2)))
    if plain.shape[0]:
        rows = torch.tensor([0, plain.shape[0] - 1])
        assert torch.equal(torch.nn.functional.embedding(rows, qt), plain[rows])
    assert torch.equal(
        qt.view(plain.shape[1], plain.shape[0]), plain.view(plain.shape[1], plain.shape[0])
    )
    assert torch.equal(qt[:1], plain[:1])
    assert torch.equal(torch.nn.functional.gelu(qt), torch.nn.functional.gelu(plain))


IN_PLACE = {
    "add_ a number": lambda w: w.add_(1.0), "add_ a tensor": lambda w: w.add_(torch.ones(w.shape)),
    "mul_": lambda w: w.mul_(2.0), "div_ rounded": lambda w: w.div_(2.0, rounding_mode="floor"),
    "+=": lambda w: w.__iadd__(1.0), "neg_": lambda w: w.neg_(), "pow_": lambda w: w.pow_(2), "relu_": lambda w: w.relu_(),
    "clamp_min_": lambda w: w.clamp_min_(0.0), "lerp_": lambda w: w.lerp_(torch.ones(w.shape), torch.ones(w.shape)),
    "addcmul_": lambda w: w.addcmul_(torch.ones(w.shape), torch.ones(w.shape)),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(w.shape) > 0, 1.0), "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1.0), "normal_": lambda w: w.normal_(), "init": lambda w: torch.nn.init.constant_(w, 1.0),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), torch.ones(1, w.shape[1])), "t_": lambda w: w.t_(),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
}  # fmt: skip


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_changing_a_weight_in_place_is_refused_instead_of_lost(layout, change):
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            qt = quantized(torch.ones(16, 32), layout)
            before = qt.dequantize()
            with pytest.raises(UnsupportedLayerError, match="in place"):
                change(qt)
            assert torch.equal(qt.dequantize(), before)


def test_what_changes_no_value_in_place_is_allowed(layout, weight):
    qt = quantized(weight, layout)
    assert qt.detach_() is not None and not qt.requires_grad_(False).requires_grad
    assert torch.equal(qt.dequantize(), quantized(weight, layout).dequantize())


@pytest.mark.parametrize("seed", [0, None, 7], ids=["nearest", "none", "stochastic"])
def test_requantizing_keeps_options_shapes_and_the_stored_size(layout, weight, seed):
    qt = quantized(weight, layout)
    again = qt.requantize_from_float(
        qt.dequantize() + 0.01, scale="recalculate", stochastic_rounding=seed, inplace_ops=True
    )
    assert again._layout_cls == qt._layout_cls
    assert [(t.shape, t.dtype) for t in tensors_of(again)] == [
        (t.shape, t.dtype) for t in tensors_of(qt)
    ]


def test_stochastic_rounding_is_seeded_and_its_mean_is_the_weight(layout):
    weight = torch.full((64, 256), 0.3)
    weight[:, 0] = 1.0
    a, b = (quantized(weight, layout, stochastic_rounding=5) for _ in range(2))
    assert torch.equal(a._qdata.view(torch.uint8), b._qdata.view(torch.uint8))
    if "w4a" in get_layout_class(layout).FORMAT.name or getattr(
        get_layout_class(layout).OPTIONS, "convrot", False
    ):
        return  # rotated: the constant lies on another grid
    mean = torch.stack(
        [quantized(weight, layout, stochastic_rounding=s).dequantize()[:, 1:] for s in range(1, 9)]
    ).mean()
    # Error of the mean of 8 x 64 x 255 draws, 7 sigma: a step of at most 0.17 (FP4) / sqrt(12 * 130560) * 7 = 0.00095
    assert abs(mean.item() - 0.3) < 0.00095


def test_requantizing_decoded_values_changes_nothing(layout, weight):
    name = get_layout_class(layout).FORMAT.name
    if "w4a" in name or getattr(get_layout_class(layout).OPTIONS, "convrot", False):
        return  # rotating back and forth moves values by some ulp; covered by the error bound above
    plain = quantized(weight, layout).dequantize()
    again = quantized(plain, layout).dequantize()
    # A scale recomputed as (q * s) / q may differ from s in its last bit.
    assert torch.allclose(again, plain, rtol=3e-7, atol=0)


def test_flattening_and_gathering_gives_the_same_tensor(layout, weight):
    qt = quantized(weight, layout)
    names, context = qt.__tensor_flatten__()
    inner = {name: getattr(qt, name) for name in names}
    assert all(tensor.is_contiguous() for tensor in inner.values())
    buffers = {
        name: torch.empty(t.numel() * t.element_size(), dtype=torch.uint8)
        .view(t.dtype)
        .view(t.shape)
        for name, t in inner.items()
    }
    rebuilt = QuantizedTensor.__tensor_unflatten__(buffers, context, qt.shape, qt.stride())
    rebuilt.copy_(qt)
    assert torch.equal(rebuilt.dequantize(), qt.dequantize())


def test_state_dict_pieces_are_the_stored_tensors(layout, weight):
    qt = quantized(weight, layout)
    cls = get_layout_class(layout)
    stored = cls.stored(qt._qdata, qt._params)
    pieces = qt.state_dict("w.weight")
    assert len(pieces) == len(stored) and pieces["w.weight"] is qt._qdata
    again = QuantizedTensor(
        stored["weight"], layout, cls.params_of(stored, qt.dtype, tuple(qt.shape))
    )
    assert torch.equal(again.dequantize(), qt.dequantize())


@pytest.mark.parametrize(
    "name", ["int8_blockwise", "int8_lodewise", "int8_tensorwise", "float8_e4m3fn_rowwise"]
)
def test_full_precision_in_the_marker_leaves_activations_alone(name):
    format = get_format(name)
    rounding = register_layout(name, format.Options())
    precise = register_layout(
        name, dataclasses.replace(format.Options(), full_precision_matrix_mult=True)
    )
    assert precise == f"{rounding}Precise"
    weight, x = torch.randn(256, 256), torch.randn(7, 256)
    results = [
        torch.nn.functional.linear(x, quantized(weight, layout)) for layout in (rounding, precise)
    ]
    expected = x @ quantized(weight, precise).dequantize().t()
    assert torch.allclose(results[1], expected, rtol=1e-5, atol=1e-4)
    assert 1e-3 < (results[0] - expected).norm() / expected.norm() < 0.04


def test_the_name_carries_the_options_and_registers_once():
    a = register_layout(
        "int8_blockwise", get_format("int8_blockwise").configure({"block_size": 64})
    )
    assert (
        a
        == "FewBitsInt8Blockwise64"
        == register_layout(
            "int8_blockwise", get_format("int8_blockwise").configure({"block_size": 64})
        )
    )
    assert get_layout_class(a) is get_layout_class(a)
    assert not get_layout_class(a).supports_fast_matmul()
    assert dataclasses.is_dataclass(get_layout_class(a).Params)


@pytest.mark.parametrize("name", ["int8_blockwise", "float8_e4m3fn_rowwise", "bnb_nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_linear_has_no_graph_breaks(name, dtype):
    layout = register_layout(name, get_format(name).Options())
    module = torch.nn.Linear(256, 128, dtype=dtype)
    module.weight = torch.nn.Parameter(
        quantized(module.weight.detach(), layout), requires_grad=False
    )
    x = torch.randn(4, 256, dtype=dtype)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager")
        assert close(compiled(x), module(x), dtype)
    assert not torch._dynamo.utils.counters["graph_break"]
