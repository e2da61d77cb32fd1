"""Odd files of every kind: each is read rightly through every door, or refused by name through every door."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import (
    convert_file,
    inspect_file,
    quantize_file,
    repair_file,
    verify_file,
)
from fewbits.quant_ops.errors import QuantError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects

WIDE = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALE = WIDE.abs().max() / 448
FP8 = (WIDE / SCALE).to(E4M3)
ROWS = WIDE.abs().amax(1, keepdim=True)
INT8 = (WIDE * 127 / ROWS).round().to(torch.int8)
KIJAI = {
    "scaled_fp8": torch.empty(0, dtype=E4M3),
    "a.weight": FP8,
    "a.scale_weight": SCALE,
    "a.scale_input": torch.tensor(0.02),
    "b.weight": WIDE.bfloat16(),
    "b.scale_weight": torch.tensor(1.0),
    "n.weight": torch.ones(64),
}


def stored(name="float8_e4m3fn", base="a", more=None, **options):
    """A layer of ours, with `more` in its JSON."""
    tensors, marker = dialects.native(name, WIDE, **options)
    return dialects.under(base, tensors, {**marker, **(more or {})})


def changed(tensors, **changes):
    """With some of layer a's tensors replaced."""
    return tensors | {f"a.{suffix}": tensor for suffix, tensor in changes.items()}


def marked(tensors, **marker):
    return {f"a.{suffix}": tensor for suffix, tensor in tensors.items()} | {
        "a.comfy_quant": dialects.json_tensor(marker)
    }


def beneath(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def header(*names, format="float8_e4m3fn"):
    layers = {name: {"format": format} for name in names}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def unmarked(tensors):
    return {name: tensor for name, tensor in tensors.items() if "comfy_quant" not in name}


def state_of(tensors, **changes):
    """bitsandbytes' tensors, with its JSON changed."""
    key = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[key].tolist()))
    return tensors | {key: dialects.json_tensor({**state, **changes})}


BNB = dialects.bitsandbytes("a", WIDE)
# What is read: (tensors, metadata, largest error of layer a).
READ = {
    "Kijai": (KIJAI, None, 0.03),
    "Kijai, input scale a copy": (KIJAI | {"a.scale_input": SCALE.clone()}, None, 0.03),
    "Kijai, e4m3 codes under an e5m2 marker": (KIJAI | {"scaled_fp8": torch.empty(0, dtype=E5M2)}, None, 0.03),
    "Kijai, FP8 biases": (KIJAI | {"a.bias": torch.ones(64).to(E4M3)}, None, 0.03),
    "two markers": (KIJAI | beneath("model.diffusion_model.", KIJAI), None, 0.03),
    "modelopt FP8": ({"a.weight": FP8, "a.weight_scale": SCALE, "a.input_scale": torch.tensor(0.1)}, None, 0.03),
    "a scale of three dimensions": (changed(stored(), weight_scale=SCALE.reshape(1, 1, 1)), None, 0.03),
    "a scale in float64": (changed(stored(), weight_scale=SCALE.double()), None, 0.03),
    "row scales flat": (changed(stored("int8_tensorwise"), weight_scale=(ROWS / 127).reshape(-1)), None, 0.01),
    "a tensor scale of one dimension": (changed(t := stored("nvfp4"), weight_scale_2=t["a.weight_scale_2"].reshape(1)), None, 0.12),
    "exponents under their own type": (changed(t := stored("mxfp8"), weight_scale=t["a.weight_scale"].view(torch.float8_e8m0fnu)), None, 0.04),
    "unknown keys in the JSON": (stored(more={"made_by": ["me"], "notes": {"a": 1}}), None, 0.03),
    "one scale twice": ({"a.weight": FP8, "a.weight_scale": SCALE, "a.scale_weight": SCALE.reshape(1)}, None, 0.03),
    "JSON in the header only": (unmarked(stored()), header("a"), 0.03),
    "INT8 in the header, FP8 stored": (unmarked(stored()), header("a", format="int8_tensorwise"), 0.03),
    "an input scale of many": (stored() | {"a.input_scale": torch.rand(64)}, None, 0.03),
    "a bf16 layer with scales": ({"a.weight": WIDE.bfloat16(), "a.weight_scale": SCALE, "a.input_scale": SCALE}, None, 0.003),
    "LLM.int8 that was not quantized": ({"a.weight": WIDE.half(), "a.SCB": ROWS.reshape(-1)}, None, 0.001),
    "LLM.int8, scales in half precision": ({"a.weight": INT8, "a.SCB": ROWS.half()}, None, 0.01),
    "bitsandbytes, flat the other way": (BNB | {"a.weight": BNB["a.weight"].reshape(1, -1)}, None, 0.12),
    "a header that is no JSON": (stored(), {"_quantization_metadata": "{oops"}, 0.03),
    "JSON that is none beside FP8": (stored() | {"a.comfy_quant": dialects.json_tensor([1])}, None, 0.03),
    "JSON that is none beside a float weight": (stored() | {"a.weight": WIDE.bfloat16(), "a.comfy_quant": dialects.json_tensor([1])}, None, 0.003),
    "four dialects": (stored() | dialects.bitsandbytes("b", WIDE) | dialects.scaled_fp8("c", WIDE) | dialects.int8_fast("d", WIDE, 64), None, 0.03),
}  # fmt: skip
# What is refused: (tensors, what the refusal says).
REFUSED = {
    "scales that differ": ({"a.weight": FP8, "a.weight_scale": SCALE, "a.scale_weight": 2 * SCALE}, "differ"),
    "scale_inv beside a scale": ({"a.weight": FP8, "a.weight_scale": SCALE, "a.weight_scale_inv": SCALE}, "which of them counts"),
    "scale_inv beside JSON": (marked({"weight": FP8, "weight_scale_inv": SCALE}, format="float8_e4m3fn"), "which of them counts"),
    "FP8 with a scale of scales": ({"a.weight": FP8, "a.weight_scale": SCALE, "a.weight_scale_2": SCALE}, "weight_scale_2 beside weight_scale"),
    "FP8 with LLM.int8's scales": ({"a.weight": FP8, "a.SCB": ROWS.reshape(-1)}, "SCB beside F8_E4M3 codes"),
    "LLM.int8 with other scales": ({"a.weight": INT8, "a.SCB": ROWS.reshape(-1), "a.weight_scale": ROWS / 127}, "weight_scale beside SCB"),
    "a scale of another name": ({"a.weight": FP8, "a.scale": SCALE}, "a.scale"),
    "a scale below the weight": ({"a.weight": FP8, "a.weight.scale": SCALE}, "a.weight.scale"),
    "outliers": (stored() | {"a.outliers": torch.randn(64, 4)}, "a.outliers"),
    "codes of another name": ({"a.in_proj_weight": FP8, "a.in_proj_weight_scale": SCALE}, "a.in_proj_weight"),
    "INT8 with zero points of another shape": ({"a.weight": INT8, "a.weight_scale": ROWS / 127, "a.weight_zero_point": torch.ones(7, dtype=torch.int8)}, "compressed-tensors"),
    "zero points beside JSON": (changed(stored("int8_tensorwise"), weight_zero_point=torch.ones(64, 1, dtype=torch.int8)), "no format has both"),
    "scales along the columns": ({"a.weight": FP8, "a.weight_scale": SCALE.expand(1, 64)}, "weight_scale is"),
    "INT8 scales along the columns": (changed(stored("int8_tensorwise"), weight_scale=(ROWS / 127).t()), "weight_scale is"),
    "groups the other way": (changed(t := stored("int8_lodewise", block_size=64), weight_scale=t["a.weight_scale"].t()), "weight_scale is"),
    "exponents as numbers": (changed(t := stored("mxfp8"), weight_scale=t["a.weight_scale"].float()), "weight_scale is F32"),
    "a scale of whole numbers": (changed(stored(), weight_scale=torch.tensor(1, dtype=torch.int32)), "weight_scale is I32"),
    "a complex scale": (changed(stored(), weight_scale=torch.tensor(1 + 1j)), "weight_scale is C64"),
    "FP8 that says it is rotated": (stored(more={"convrot": True}), "never is"),
    "a format of the future": (marked({"weight": FP8, "weight_scale": SCALE}, format="fp8_magic"), "fp8_magic"),
    "bf16 that says it is FP8": (marked({"weight": WIDE.bfloat16(), "weight_scale": SCALE}, format="float8_e4m3fn"), "weight is BF16"),
    "a shape that its bias denies": (state_of(BNB, shape=[256, 64]) | {"a.bias": torch.zeros(64)}, "its bias has 64 rows"),
    "INT8 beside JSON that is none": (marked({"weight": INT8, "weight_scale": ROWS / 127}) | {"a.comfy_quant": dialects.json_tensor([1])}, "could have said that the INT8 codes are rotated"),
    "INT8 or two codes a byte": ({"a.weight": INT8, "a.weight_scale": (ROWS / 127).reshape(-1)}, "stores two codes a byte so"),
    "FP8 of rows that says it is rotated INT8": (marked({"weight": FP8, "weight_scale": ROWS / 448}, format="int8_tensorwise", convrot=True), "never is"),
    "4-bit codes beside JSON that is none": (stored("bnb_nf4") | {"a.comfy_quant": dialects.json_tensor([1])}, "a.weight' U8|tensors alone do not tell"),
    "an offset": ({"a.weight": INT8, "a.weight_scale": ROWS / 127, "a.weight_offset": torch.zeros(64, 1)}, "a.weight_offset"),
    "the least of a row": ({"a.weight": INT8, "a.weight_scale": ROWS / 127, "a.weight_min": torch.zeros(64, 1)}, "a.weight_min"),
    "Prism": ({"a.weight": FP8, "a.weight.prism_scale": ROWS / 448}, "a.weight.prism_scale"),
    "torchao": ({"a._weight_qdata": FP8, "a._weight_scale": SCALE.reshape(1, 1)}, "torchao"),
    "HQQ, codes as floats": ({"a.W_q": torch.randn(64, 64).half(), "a.scale": torch.rand(64, 4), "a.zero": torch.rand(64, 4)}, "HQQ"),
    "quanto, 4 bit": ({"a.weight._data._data": torch.ones(64, 128, dtype=torch.uint8), "a.weight._scale": torch.rand(128, 1), "a.weight._shift": torch.rand(128, 1)}, "quanto"),
    "quanto, groups that do not fit": ({"a.weight._data._data": torch.ones(64, 128, dtype=torch.uint8), "a.weight._scale": torch.rand(100, 1), "a.weight._shift": torch.rand(100, 1)}, "do not fit"),
    "ExLlamaV2": ({"a.q_weight": torch.ones(16, 64, dtype=torch.int32), "a.q_scale": torch.ones(4, 8, dtype=torch.int32)}, "ExLlamaV2"),
    "gpt-oss": ({"e.down_proj_blocks": torch.ones(2, 64, 8, 16, dtype=torch.uint8), "e.down_proj_scales": torch.ones(2, 64, 8, dtype=torch.uint8)}, "gpt-oss"),
    "whole numbers for a weight": ({"a.weight": torch.ones(64, 64, dtype=torch.int64)}, "a.weight"),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def run(tensors, metadata=None):
        path = tmp_path / "in.safetensors"
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata
        )
        return path

    return run


def recipe(wish="int8_tensorwise"):
    return Recipe(parse_wish(wish), preset="none")


def doors(path, out):
    """door -> a call that writes `out`."""
    return {
        "convert": lambda: convert_file(path, out, overwrite=True),
        "decode": lambda: convert_file(path, out, to="bf16", overwrite=True),
        "repair": lambda: repair_file(path, out, overwrite=True),
        "quantize": lambda: quantize_file(path, out, recipe(), requantize=True, overwrite=True),
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", READ)
def test_what_can_be_read_is_right_through_every_door(case, write, tmp_path):
    tensors, metadata, largest = READ[case]
    path, out = write(tensors, metadata), tmp_path / "out.safetensors"
    inspection, found = inspect_file(path), verify_file(path)
    assert all("[fewbits repair]" in text for text in inspection.findings), inspection.findings
    assert {finding.to_text() for finding in found.findings} == set(inspection.findings)
    for name, door in doors(path, out).items():
        door()
        rounded = 0.01 if name == "quantize" else 0.002
        assert float((dialects.decoded(out) - WIDE).norm() / WIDE.norm()) < largest + rounded, name
        assert verify_file(out).ok and inspect_file(out).findings == (), name


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_through_every_door(case, write, tmp_path):
    tensors, why = REFUSED[case]
    path, out = write(tensors | {"z.weight": WIDE}), tmp_path / "out.safetensors"
    inspection, found = inspect_file(path), verify_file(path)
    assert re.search(why, str(inspection.findings)) and "see the problems" in inspection.loads_in
    assert re.search(why, str([finding.to_text() for finding in found.findings]))
    for door in doors(path, out).values():
        with pytest.raises(QuantError, match=why):
            door()
    assert not out.exists()


ODD = {
    "complex": torch.complex64, "float64": torch.float64, "int64": torch.int64, "int16": torch.int16,
    "uint16": torch.uint16, "uint32": torch.uint32, "uint64": torch.uint64, "bool": torch.bool,
    "exponents": torch.float8_e8m0fnu,
}  # fmt: skip


def test_tensors_of_every_type_that_stay_come_out_byte_for_byte(write, tmp_path):
    dice = torch.Generator().manual_seed(4)
    raw = {name: torch.randint(0, 2, (6, 16 * dtype.itemsize), generator=dice).to(torch.uint8) for name, dtype in ODD.items()}  # fmt: skip
    odd = {f"rope.{name}": raw[name].view(dtype) for name, dtype in ODD.items()}
    path, out = write(stored() | odd), tmp_path / "out.safetensors"
    for door in doors(path, out).values():
        door()
        made = load_file(out)
        for name, tensor in odd.items():
            assert made[name].dtype == tensor.dtype and made[name].shape == tensor.shape
            assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "C128"])
def test_types_that_nothing_here_copies_are_refused_by_name(dtype, tmp_path):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    text = json.dumps({"a": {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    for door in (lambda: inspect_file(path), lambda: verify_file(path), *doors(path, out).values()):
        with pytest.raises(QuantError, match=f"tensor 'a' has dtype '{dtype}'"):
            door()


def test_an_unknown_tensor_beside_codes_is_carried_over(write, tmp_path):
    path, out = write(stored() | {"a.gamma": torch.rand(64)}), tmp_path / "out.safetensors"
    for door in doors(path, out).values():
        door()
        assert "a.gamma" in load_file(out)


def test_a_header_without_the_prefix_of_its_names_is_read(write, tmp_path):
    tensors = unmarked(stored(base="model.diffusion_model.a"))
    path, out = write(tensors, header("a")), tmp_path / "out.safetensors"
    assert inspect_file(path).formats == {"float8_e4m3fn": 1}
    for door in doors(path, out).values():
        door()
        assert verify_file(out).ok


def test_a_scale_that_may_be_a_reciprocal_is_a_problem(write):
    path = write(changed(stored(), weight_scale=1 / SCALE))
    assert [finding.name for finding in verify_file(path).findings] == ["scale-implausible"]


def test_shards_of_quantized_layers_are_read_as_one_file(tmp_path):
    parts = {
        "1.safetensors": stored(),
        "2.safetensors": dialects.bitsandbytes("b", WIDE) | {"c.weight": WIDE},
    }
    places = {name: part for part, tensors in parts.items() for name in tensors}
    for part, tensors in parts.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / part)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    out = tmp_path / "out.safetensors"
    assert inspect_file(path).formats == {"float8_e4m3fn": 1, "bnb_nf4": 1}
    for door in doors(path, out).values():
        door()
        assert (
            float((dialects.decoded(out) - WIDE).norm() / WIDE.norm()) < 0.04
            and verify_file(out).ok
        )


FLOATS = {"INT8": INT8.float(), "FP8": FP8.float(), "FP8 in bf16": FP8.bfloat16()}


@pytest.mark.parametrize("codes", FLOATS)
def test_codes_as_floats_beside_a_scale_are_no_weights(codes, write, tmp_path):
    path, out = (
        write({"a.weight": FLOATS[codes], "a.weight_scale": SCALE}),
        tmp_path / "out.safetensors",
    )
    (finding,) = verify_file(path).findings
    assert finding.name == "unreadable" and "these are codes" in finding.to_text()
    for door in doors(path, out).values():
        with pytest.raises(QuantError, match="these are codes"):
            door()
    assert not out.exists()
