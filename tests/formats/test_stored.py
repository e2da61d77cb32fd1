"""Reading stored layers back: options, logical shape and dtype, other writers' spellings, damaged layers."""

import dataclasses

import pytest
import torch

from fewbits.quant_ops.errors import CheckpointError, QuantError
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.formats.base import FORMATS, dtype_from_json
from fewbits.quant_ops.spec import LayerInput, TensorSpec
from support.codec import CANONICAL, encode, layer_of, specs_of, wish

ANY = LayerInput((256, 256), None)
STATES_DTYPE = ("mxfp8", "nvfp4", "bnb_nf4", "bnb_fp4")


@pytest.mark.parametrize("precise", [False, True], ids=["", "full precision"])
@pytest.mark.parametrize("case", CANONICAL)
def test_options_shape_and_marker_are_read_back(case, precise):
    name, options = wish(case)
    options = dataclasses.replace(
        options, full_precision_matrix_mult=precise or options.full_precision_matrix_mult
    )
    rows = 128 if name.endswith("_blockwise") else 130
    weight = torch.randn(rows, 512).bfloat16()
    tensors, marker = encode(name, weight, options)
    format, specs = get_format(name), specs_of(tensors)
    assert format.options_from(marker, specs) == options
    stored = format.stored_layer(marker, specs)
    assert stored.shape == tuple(weight.shape)
    assert stored.dtype == ("BF16" if name in STATES_DTYPE else None)
    assert format.marker(stored, options) == marker
    assert list(format.marker(stored, options)) == list(marker)


MARKERS = {
    "float8_e4m3fn": {"format": "float8_e4m3fn"},
    "float8_e5m2": {"format": "float8_e5m2", "full_precision_matrix_mult": True},
    "float8_e4m3fn_rowwise": {"format": "float8_e4m3fn_rowwise"},
    "float8_e4m3fn_blockwise": {"format": "float8_e4m3fn_blockwise", "group_size": 64, "params": {"group_size": 64}},
    "float8_e4m3fn_block3d": {"format": "float8_e4m3fn_block3d", "group_size": 64, "params": {"group_size": 64}},
    "int8_tensorwise": {"format": "int8_tensorwise", "per_row": True},
    "int8_blockwise": {"format": "int8_blockwise", "group_size": 128, "params": {"group_size": 128}},
    "int8_lodewise": {"format": "int8_lodewise", "group_size": 128, "params": {"group_size": 128}},
    "mxfp8": {
        "format": "mxfp8", "group_size": 32, "params": {"group_size": 32}, "orig_dtype": "bfloat16",
        "orig_shape": [100, 70],
    },
    "nvfp4": {
        "format": "nvfp4", "group_size": 16, "params": {"group_size": 16}, "orig_dtype": "bfloat16",
        "orig_shape": [100, 70],
    },
    "convrot_w4a4": {"format": "convrot_w4a4", "convrot_groupsize": 256},
    "asym_w4a8_int8": {
        "format": "asym_w4a8_int8", "group_size": 16, "params": {"group_size": 16}, "convrot_groupsize": 256,
    },
    "bnb_nf4": {
        "format": "bnb_nf4", "group_size": 64, "params": {"group_size": 64}, "shape": [100, 70],
        "nibble_order": "high", "dtype": "bfloat16",
    },
    "bnb_fp4": {
        "format": "bnb_fp4", "group_size": 64, "params": {"group_size": 64}, "shape": [100, 70],
        "nibble_order": "high", "dtype": "bfloat16",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_the_default_marker_has_the_keys_of_the_format_page_in_its_order(name):
    format = get_format(name)
    marker = format.marker(LayerInput((100, 70), "BF16"), format.Options())
    assert list(marker.items()) == list(MARKERS[name].items())
    precise = dataclasses.replace(format.Options(), full_precision_matrix_mult=True)
    assert (
        list(format.marker(LayerInput((100, 70), "BF16"), precise))[-1]
        == "full_precision_matrix_mult"
    )


def test_markers_state_tensor_scales_rotation_and_activations_when_asked():
    int8, w4a4, layer = (
        get_format("int8_tensorwise"),
        get_format("convrot_w4a4"),
        LayerInput((64, 256), "F32"),
    )
    assert int8.marker(layer, int8.configure({"scaling": "tensor"})) == {
        "format": "int8_tensorwise"
    }
    rotated = int8.marker(layer, int8.configure({"convrot": True, "convrot_groupsize": 16}))
    assert list(rotated.items()) == [
        ("format", "int8_tensorwise"), ("convrot", True), ("convrot_groupsize", 16), ("per_row", True),
    ]  # fmt: skip
    asked = w4a4.marker(layer, w4a4.configure({"linear_dtype": "int8"}))
    assert list(asked.items()) == [
        ("format", "convrot_w4a4"),
        ("convrot_groupsize", 256),
        ("linear_dtype", "int8"),
    ]


@pytest.mark.parametrize(
    ("dtype", "stated"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
        (torch.float32, "float32"),
        (torch.float64, "float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", STATES_DTYPE)
def test_the_marker_states_the_source_dtype(name, dtype, stated):
    format = get_format(name)
    marker = format.marker(layer_of(torch.zeros(64, 64, dtype=dtype)), format.Options())
    assert marker["orig_dtype" if "orig_dtype" in marker else "dtype"] == stated


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("bfloat16", "BF16"),
        ("torch.bfloat16", "BF16"),
        ("float16", "F16"),
        ("float32", "F32"),
        ("int8", None),
        (None, None),
    ],
)
def test_dtypes_are_read_with_and_without_the_torch_prefix(text, dtype):
    assert dtype_from_json(text) == dtype


def test_comfyui_s_own_files_state_no_shape_and_keep_stating_none():
    """ComfyUI saves nvfp4 and mxfp8 with `format` alone; the padded matrix is then the layer."""
    for name, scale in (("nvfp4", "U8"), ("mxfp8", "F8_E8M0")):
        tensors, _ = encode(name, torch.randn(100, 70), {})
        format, specs = get_format(name), specs_of(tensors)
        specs["weight_scale"] = dataclasses.replace(specs["weight_scale"], dtype=scale)
        assert format.options_from({"format": name}, specs) == format.Options()
        stored = format.stored_layer({"format": name}, specs)
        assert stored == LayerInput({"nvfp4": (112, 80), "mxfp8": (128, 96)}[name], None)
        assert "orig_shape" not in format.marker(stored, format.Options())


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
@pytest.mark.parametrize("name", ["int8_tensorwise", "convrot_w4a4", "asym_w4a8_int8"])
def test_every_rotation_group_is_read_also_those_that_are_not_written(name, group):
    format = get_format(name)
    rotated = {"convrot": True} if name == "int8_tensorwise" else {}
    options = format.Options(convrot_groupsize=group, **rotated)
    weight = torch.randn(16, 1024)
    tensors, marker = encode(name, weight, options)
    assert format.options_from(marker, specs_of(tensors)) == options
    decoded = format.dequantize(tensors, layer_of(weight), options)
    assert (decoded - weight).norm() / weight.norm() < 0.16


def test_a_rotation_stated_inside_params_is_read():
    tensors, _ = encode("int8_tensorwise", torch.randn(16, 256), wish("int8_tensorwise:convrot")[1])
    marker = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}
    options = get_format("int8_tensorwise").options_from(marker, specs_of(tensors))
    assert (options.convrot, options.convrot_groupsize) == (True, 64)


def damaged(name: str, marker: dict | None = None, without: str = "", **specs: TensorSpec) -> None:
    """Read a 64 x 256 layer of a format with some tensors or marker entries replaced."""
    case = {"int8_tensorwise": "int8_tensorwise:convrot"}.get(name, name)
    tensors, good = encode(name, torch.randn(64, 256), wish(case)[1])
    found = {
        **specs_of(tensors),
        **{key: dataclasses.replace(spec, name=key) for key, spec in specs.items()},
    }
    found.pop(without, None)
    get_format(name).options_from({**good, **(marker or {})}, found)


def spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec("", dtype, shape)


DAMAGE = {
    "a row scale under the scalar name": (
        "float8_e4m3fn",
        {"weight_scale": spec("F32", 64)},
        "weight_scale",
    ),
    "a scalar stored as (1,)": ("float8_e4m3fn", {"weight_scale": spec("F32", 1)}, "weight_scale"),
    "a row scale without its second dimension": (
        "int8_tensorwise",
        {"weight_scale": spec("F32", 64)},
        "weight_scale",
    ),
    "a bf16 scale": ("int8_tensorwise", {"weight_scale": spec("BF16", 64, 1)}, "weight_scale"),
    "a rotated layer with one scale": ("int8_tensorwise", {"weight_scale": spec("F32")}, "convrot"),
    "an nvfp4 scale that is not padded": (
        "nvfp4",
        {"weight_scale": spec("F8_E4M3", 64, 16)},
        "weight_scale",
    ),
    "an nvfp4 tensor scale with a dimension": (
        "nvfp4",
        {"weight_scale_2": spec("F32", 1)},
        "weight_scale_2",
    ),
    "an mxfp8 scale in float32": ("mxfp8", {"weight_scale": spec("F32", 128, 8)}, "weight_scale"),
    "absmax of another group size": ("bnb_nf4", {"absmax": spec("F32", 128)}, "absmax"),
    "absmax as (N, K/g)": ("bnb_nf4", {"absmax": spec("F32", 64, 4)}, "absmax"),
    "a flat 4-bit weight": ("bnb_nf4", {"weight": spec("U8", 8192)}, "stores a matrix"),
    "a group scale in float32": (
        "asym_w4a8_int8",
        {"weight_s_rel": spec("F32", 64, 16)},
        "weight_s_rel",
    ),
    "a correction term": (
        "asym_w4a8_int8",
        {"weight_correction": spec("BF16", 16, 64)},
        "weight_correction",
    ),
    "six-bit rows": ("asym_w4a8_int8", {"weight": spec("I8", 64, 192)}, "weight_s_rel"),
    "a w4a4 scale per row and column": (
        "convrot_w4a4",
        {"weight_scale": spec("F32", 64, 1)},
        "weight_scale",
    ),
}


@pytest.mark.parametrize(("name", "specs", "message"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_are_refused_by_name(name, specs, message):
    with pytest.raises(CheckpointError, match=message):
        damaged(name, **specs)


WRONG_MARKERS = {
    "low nibble first": ("bnb_nf4", {"nibble_order": "low"}, "nibble_order is 'low'"),
    "no nibble order": ("bnb_nf4", {"nibble_order": None}, "nibble_order is None"),
    "a shape that is not the weight's": ("bnb_nf4", {"shape": [256, 64]}, "shape is"),
    "a group size as text": ("bnb_nf4", {"group_size": "64"}, "block_size must be int"),
    "a shape that does not pad to the weight": ("nvfp4", {"orig_shape": [20, 40]}, "orig_shape is"),
    "a shape that is no pair": ("mxfp8", {"orig_shape": 64}, "orig_shape is 64"),
    "a rotation that is no power of four": (
        "int8_tensorwise",
        {"convrot_groupsize": 128},
        "convrot_groupsize is 128",
    ),
    "a rotation that does not divide K": (
        "convrot_w4a4",
        {"convrot_groupsize": 1024},
        "convrot_groupsize is 1024",
    ),
    "a rotation as text": (
        "asym_w4a8_int8",
        {"convrot_groupsize": "256"},
        "convrot_groupsize is '256'",
    ),
    "unknown activations": ("convrot_w4a4", {"linear_dtype": "fp8"}, "linear_dtype is 'fp8'"),
}


@pytest.mark.parametrize(("name", "marker", "message"), WRONG_MARKERS.values(), ids=WRONG_MARKERS)
def test_markers_that_contradict_the_tensors_are_refused(name, marker, message):
    with pytest.raises(QuantError, match=message):
        damaged(name, marker)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        (name, suffix)
        for name, format in FORMATS.items()
        for suffix in format.tensor_specs(ANY, format.Options())
    ],
    ids=lambda value: value,
)
def test_a_missing_tensor_is_named(name, suffix):
    with pytest.raises(CheckpointError, match=suffix):
        damaged(name, without=suffix)
