"""What is said to open in stock ComfyUI gives the same weights there; what is said to need FewBits does not.

The oracle is ComfyUI's own code without our seams: its conversion of old files, its layer, its decoding.
"""

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops.doors import inspect_file
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.spec import version_key
from support import dialects

N, K = 128, 256
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 16
KEY = "_quantization_metadata"


def stored(name, more=None, changes=None, **options):
    """A layer of a format; `more` in its JSON, `changes` by suffix are functions of a tensor."""
    tensors, marker = dialects.native(name, WEIGHT, **options)
    for suffix, change in (changes or {}).items():
        tensors[suffix] = change(tensors[suffix])
    return dialects.under("a", tensors, {**marker, **(more or {})}), None


def in_header(name):
    tensors, marker = dialects.native(name, WEIGHT)
    return dialects.under("a", tensors), {KEY: json.dumps({"layers": {"a": marker}})}


def header_against_json(name, other):
    """The header's JSON counts, in ComfyUI too."""
    tensors, marker = dialects.native(name, WEIGHT)
    layers = {"layers": {"a": marker}}
    return dialects.under("a", tensors, {"format": other}), {KEY: json.dumps(layers)}


def without_json(name, more=None):
    tensors, _ = dialects.native(name, WEIGHT)
    return dialects.under("a", tensors) | (more or {}), None


EMPTY = torch.empty(0, dtype=torch.float8_e4m3fn)
CASES = {
    **{name: stored(name) for name in FORMATS},
    **{f"{name}, JSON in the header": in_header(name) for name in ("float8_e4m3fn", "nvfp4", "bnb_nf4")},
    "INT8 with one scale": stored("int8_tensorwise", scaling="tensor"),
    "INT8 rotated": stored("int8_tensorwise", convrot=True, convrot_groupsize=64),
    "INT8, flat scales": stored("int8_tensorwise", changes={"weight_scale": lambda s: s.reshape(-1)}),
    "INT8, scales in bf16": stored("int8_tensorwise", changes={"weight_scale": lambda s: s.bfloat16()}),
    "FP8, a scale of one dimension": stored("float8_e4m3fn", changes={"weight_scale": lambda s: s.reshape(1)}),
    "FP8, full precision": stored("float8_e4m3fn", full_precision_matrix_mult=True),
    "FP8, more in the JSON": stored("float8_e4m3fn", more={"made_by": "me"}),
    "FP8 with rows under the tag of one scale": (
        dialects.under("a", dialects.native("float8_e4m3fn_rowwise", WEIGHT)[0], {"format": "float8_e4m3fn"}), None
    ),
    "FP8 that the JSON calls INT8, the header FP8": header_against_json("float8_e4m3fn", "int8_tensorwise"),
    "FP8 without JSON": without_json("float8_e4m3fn"),
    "FP8 without JSON, marked": without_json("float8_e4m3fn", {"scaled_fp8": EMPTY}),
    "FP8 of old": (dialects.scaled_fp8("a", WEIGHT) | {"scaled_fp8": EMPTY}, None),
    "INT8 without JSON": without_json("int8_tensorwise"),
    "a plain cast": ({"a.weight": (WEIGHT * 4).to(torch.float8_e4m3fn)}, None),
    "a float weight with a scale": ({"a.weight": WEIGHT.bfloat16(), "a.weight_scale": torch.tensor(0.5)}, None),
    "a float weight in an old file": (
        {"a.weight": WEIGHT.bfloat16(), "a.scale_weight": torch.tensor(1.0), "scaled_fp8": EMPTY}, None
    ),
    "LLM.int8": ({"a.weight": (WEIGHT * 400).round().to(torch.int8), "a.SCB": torch.ones(N)}, None),
}  # fmt: skip

# Decoded alike, but no writer of ComfyUI's formats stores scales so, and its products need not take them.
CAREFUL = ("INT8, scales in bf16", "FP8, a scale of one dimension")


def read_by_stock(comfy, tensors, metadata):
    """The weight that ComfyUI's own layer multiplies by.

    Raises:
        Exception: whatever ComfyUI raises.
    """
    convert = inspect.unwrap(comfy.utils.convert_old_quants)
    state, _ = convert({**tensors}, "", metadata=metadata)
    layer = torch.nn.Linear(K, N, bias=False)
    if comfy.utils.detect_layer_quantization(state, ""):
        ops = inspect.unwrap(comfy.ops.mixed_precision_ops)({"mixed_ops": True}, torch.float32)
        layer = ops.Linear(K, N, bias=False, device="cpu", dtype=torch.float32)
    inside = {name.removeprefix("a."): tensor for name, tensor in state.items()}
    layer.load_state_dict(inside, strict=False)
    assert layer.weight.shape == (N, K)
    weight = layer.weight.data
    return (weight.dequantize() if hasattr(weight, "_qdata") else weight).float()


@pytest.mark.parametrize("case", CASES)
def test_stock_comfyui_reads_it_exactly_where_inspect_says_so(comfy, tmp_path, case):
    from comfyui_version import __version__

    tensors, metadata = CASES[case]
    path = tmp_path / "file.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    says, truth = inspect_file(path).loads_in, dialects.decoded(path)
    since = says.partition(">= ")[2].split(",")[0]
    here = not since or version_key(since) <= version_key(__version__)
    try:
        got = read_by_stock(comfy, tensors, metadata)
        same = float((got - truth).norm()) < 1e-3 * float(truth.norm())
    except Exception:  # ComfyUI refuses a file by many errors, some of torch's own
        same = False
    claimed = says.startswith("loads in stock") and here
    assert claimed == (same and case not in CAREFUL), says
