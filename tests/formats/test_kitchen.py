"""comfy-kitchen's eager quantizers and layouts as oracles for the native formats."""

import importlib
from importlib.util import find_spec

import pytest
import torch
from comfy_kitchen.backends.eager import convrot_w4a4 as kitchen_w4a4
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.float_utils import e8m0_to_f32, from_blocked

from support.codec import decode, encode, wish
from support.vectors import raw

SHAPE = (512, 1024)
SEEDS = [0, 1]


def weights(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Half a million weights as float32; values of bf16 and fp16 are widened, as the format demands."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.03
    return weight.to(dtype).float()


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.view(torch.int32) - b.view(torch.int32)).abs().max())


def differing(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fraction of bytes that differ."""
    x, y = (torch.frombuffer(bytearray(raw(tensor)), dtype=torch.uint8) for tensor in (a, b))
    assert len(x) == len(y)
    return float((x != y).float().mean())


W4A8 = "comfy_kitchen.backends.eager.w4a8_int8"
each_seed = pytest.mark.parametrize("seed", SEEDS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


@each_seed
@each_dtype
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_equals_comfy_kitchen_bit_for_bit(name, dtype, seed):
    weight = weights(seed, dtype)
    stored, _ = encode(name, weight, wish(name)[1])
    expected = kitchen.quantize_per_tensor_fp8(
        weight, stored["weight_scale"], stored["weight"].dtype
    )
    assert raw(stored["weight"]) == raw(expected)


@each_seed
@each_dtype
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_int8_equals_comfy_kitchen_bit_for_bit(scaling, dtype, seed):
    weight = weights(seed, dtype)
    stored, _ = encode("int8_tensorwise", weight, {"scaling": scaling})
    quantize = (
        kitchen.quantize_int8_rowwise if scaling == "row" else kitchen.quantize_int8_tensorwise
    )
    codes, scale = quantize(weight)
    assert torch.equal(stored["weight_scale"], scale)
    assert raw(stored["weight"]) == raw(codes)


@each_seed
@each_dtype
@pytest.mark.parametrize("shape", [SHAPE, (500, 1000)], ids=["whole blocks", "padded"])
def test_nvfp4_equals_comfy_kitchen_bit_for_bit(shape, dtype, seed):
    weight = weights(seed, dtype)[: shape[0], : shape[1]].contiguous()
    stored, _ = encode("nvfp4", weight, {})
    assert torch.equal(stored["weight_scale_2"], weight.abs().amax() / 2688)
    codes, scale = kitchen.quantize_nvfp4(weight, stored["weight_scale_2"], pad_16x=shape != SHAPE)
    assert raw(stored["weight"]) == raw(codes)
    assert raw(stored["weight_scale"]) == raw(scale)


@each_seed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (500, 1000)], ids=["whole blocks", "padded"])
def test_mxfp8_equals_comfy_kitchen_bit_for_bit(shape, dtype, seed):
    weight = weights(seed, dtype)[: shape[0], : shape[1]].contiguous()
    stored, _ = encode("mxfp8", weight, {})
    codes, scale = kitchen.quantize_mxfp8(weight, pad_32x=shape != SHAPE)
    assert raw(stored["weight"]) == raw(codes)
    assert raw(stored["weight_scale"]) == raw(scale)


def test_mxfp8_of_float32_differs_from_log2_only_where_log2_rounds_down():
    weight = weights(0, torch.float32)
    stored, _ = encode("mxfp8", weight, {})
    _, scale = kitchen.quantize_mxfp8(weight)
    ours, theirs = stored["weight_scale"].int(), scale.view(torch.uint8).int()
    assert ((ours == theirs) | (ours == theirs + 1)).all()


@each_seed
@pytest.mark.parametrize("group", [256, 64, 16])
def test_rotated_int8_is_within_rounding_of_comfy_kitchen(group, seed):
    weight = weights(seed, torch.bfloat16)
    options = {"scaling": "row", "convrot": True, "convrot_groupsize": group}
    stored, _ = encode("int8_tensorwise", weight, options)
    codes, scale = kitchen.quantize_int8_convrot_weight(weight, group)
    assert ulps(stored["weight_scale"], scale) <= 16
    assert differing(stored["weight"], codes) <= 1e-4
    assert int((stored["weight"].int() - codes.int()).abs().max()) <= 1


@each_seed
@pytest.mark.parametrize("group", [256, 64, 16])
def test_w4a4_is_within_rounding_of_comfy_kitchen(group, seed):
    weight = weights(seed, torch.bfloat16)
    stored, _ = encode("convrot_w4a4", weight, {"convrot_groupsize": group, "linear_dtype": "int4"})
    codes, scale = kitchen_w4a4.quantize_convrot_w4a4_weight(weight, group)
    assert ulps(stored["weight_scale"], scale) <= 16
    assert differing(stored["weight"], codes) <= 1e-4


if find_spec(W4A8):  # comfy-kitchen has it from 0.2.27 on

    @each_seed
    @pytest.mark.parametrize("group", [256, 64, 16])
    def test_w4a8_is_within_rounding_of_comfy_kitchen(group, seed):
        w4a8 = importlib.import_module(W4A8)
        weight = weights(seed, torch.bfloat16)
        stored, _ = encode("asym_w4a8_int8", weight, {"convrot_groupsize": group})
        codes, relative, channel, correction, _ = w4a8.quantize_w4a8_int8_weight(
            weight, convrot_groupsize=group, codebook_tensor=stored["weight_codebook"]
        )
        assert correction is None
        assert ulps(stored["weight_s_channel"], channel) <= 16
        assert differing(stored["weight_s_rel"], relative) <= 1e-4
        assert differing(stored["weight"], codes) <= 1e-4


def kitchen_decode(name: str, stored: dict[str, torch.Tensor], marker: dict) -> torch.Tensor:
    """The float32 weight that comfy-kitchen makes of the stored tensors."""
    weight, scale = stored["weight"], stored["weight_scale"]
    if name.startswith("float8"):
        return kitchen.dequantize_per_tensor_fp8(weight, scale, torch.float32)
    if name == "int8_tensorwise":
        if marker.get("convrot"):
            return kitchen.dequantize_int8_convrot_weight(
                weight, scale, marker["convrot_groupsize"]
            )
        return kitchen.dequantize_int8_simple(weight, scale)
    if name == "mxfp8":
        return kitchen.dequantize_mxfp8(weight, scale.view(torch.float8_e8m0fnu), torch.float32)
    if name == "nvfp4":
        return kitchen.dequantize_nvfp4(weight, stored["weight_scale_2"], scale, torch.float32)
    return kitchen_w4a4.dequantize_convrot_w4a4_weight(weight, scale, marker["convrot_groupsize"])


READ = [
    "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_tensorwise:tensor", "int8_tensorwise:convrot", "mxfp8",
    "nvfp4", "convrot_w4a4",
]  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_comfy_kitchen_reads_what_we_write_as_we_do(case):
    name, options = wish(case)
    weight = weights(0, torch.bfloat16)
    stored, marker = encode(name, weight, options)
    ours, theirs = decode(name, stored, marker), kitchen_decode(name, stored, marker)
    assert (ours - theirs).abs().max() <= 1e-6 * weight.abs().max()


if find_spec(W4A8):

    def test_comfy_kitchen_reads_w4a8_as_we_do():
        w4a8 = importlib.import_module(W4A8)
        weight = weights(0, torch.bfloat16)
        stored, marker = encode("asym_w4a8_int8", weight, {"convrot_groupsize": 64})
        theirs = w4a8.dequantize_w4a8_int8_weight(
            stored["weight"], stored["weight_s_rel"], stored["weight_s_channel"], stored["weight_codebook"],
            convrot_groupsize=64, output_dtype=torch.float32,
        )  # fmt: skip
        assert (
            decode("asym_w4a8_int8", stored, marker) - theirs
        ).abs().max() <= 1e-6 * weight.abs().max()


def test_comfy_kitchen_finds_our_block_scales_where_it_looks():
    weight = weights(0, torch.bfloat16)
    stored, _ = encode("mxfp8", weight, {})
    logical = from_blocked(stored["weight_scale"], SHAPE[0], SHAPE[1] // 32)
    largest = weight.view(SHAPE[0], -1, 32).abs().amax(2)
    scaled = largest / e8m0_to_f32(logical.contiguous())
    assert (scaled <= 448).all() and (scaled > 224).all()
