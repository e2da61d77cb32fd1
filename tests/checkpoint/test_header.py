"""Headers: what is accepted, and every way a file can be wrong, by tensor name."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fewbits.quant_ops.checkpoint.header import build_header, read_header
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.spec import TensorSpec
from support.helpers import raw_file, tiny_checkpoint

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}

HOSTILE = {
    "overlapping tensors": (
        {"a": A, "b": {**A, "data_offsets": [8, 24]}},
        24,
        "tensors 'a' and 'b' overlap",
    ),
    "beyond the end": ({"a": A}, 8, "truncated: tensor 'a' ends at byte"),
    "wrong size for the shape": (
        {"a": {**A, "shape": [2, 3]}},
        16,
        "tensor 'a' F32 [2, 3] needs 24 bytes",
    ),
    "unknown dtype": ({"a": {**A, "dtype": "F7"}}, 16, "tensor 'a' has dtype 'F7'"),
    "negative shape": (
        {"a": {**A, "shape": [-2, -2]}},
        16,
        "tensor 'a' has a malformed header entry",
    ),
    "no offsets": (
        {"a": {"dtype": "F32", "shape": [2, 2]}},
        16,
        "tensor 'a' has a malformed header entry",
    ),
    "boolean shape": (
        {"a": {**A, "shape": [True, 4]}},
        16,
        "tensor 'a' has a malformed header entry",
    ),
    "a gap between tensors": (
        {"a": A, "b": {**A, "data_offsets": [20, 36]}},
        36,
        "4 bytes before tensor 'b' belong to no tensor",
    ),
    "a gap before the first": (
        {"a": {**A, "data_offsets": [4, 20]}},
        20,
        "4 bytes before tensor 'a' belong to no tensor",
    ),
    "trailing bytes": ({"a": A}, 17, "1 bytes after the last tensor belong to no tensor"),
    "bytes and no tensor": ({}, 8, "8 bytes after the last tensor belong to no tensor"),
    "an object as shape": (
        {"a": {**A, "shape": {}}},
        16,
        "tensor 'a' has a malformed header entry",
    ),
    "a list as dtype": ({"a": {**A, "dtype": []}}, 16, "tensor 'a' has a malformed header entry"),
    "a dimension of 2^63": (
        {"a": {**A, "shape": [2**63, 0]}},
        16,
        "tensor 'a' has a malformed header entry",
    ),
    "dimensions whose product is too large": (
        {"a": {**A, "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        0,
        "tensor 'a' has a shape that no memory holds",
    ),
    "an entry that is a list": ({"a": [1, 2]}, 16, "tensor 'a' has a malformed header entry"),
    "half a character in a field that nobody reads": (
        {"a": {**A, "note": "\ud800"}},
        16,
        "header is not valid JSON ('\\ud800' holds half a character)",
    ),
    "metadata with numbers": (
        {"__metadata__": {"a": 1}},
        0,
        "__metadata__ must map strings to strings",
    ),
}


@pytest.mark.parametrize(("entries", "size", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_damaged_header_is_refused_by_tensor_name(tmp_path, entries, size, message):
    path = raw_file(tmp_path / "bad.safetensors", entries, b"\0" * size)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert message in str(error.value)
    assert "bad.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x80\x04\x95 pickle pickle pickle", "pickle files"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((5000).to_bytes(8, "little") + b"{}", "truncated: the header needs 5008 bytes"),
        ((9).to_bytes(8, "little") + b'{"a": [1}', "header is not valid JSON"),
    ],
    ids=["empty", "pickle", "huge header", "short header", "not JSON"],
)
def test_a_file_that_is_not_safetensors_says_so(tmp_path, data, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        read_header(path)


def test_a_name_that_appears_twice_is_refused(tmp_path):
    text = b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}"
    path = tmp_path / "twice.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
    with pytest.raises(CheckpointError, match="'a' appears twice"):
        read_header(path)


def test_the_header_of_the_safetensors_library_reads_back_equal(tmp_path):
    path = tiny_checkpoint(tmp_path / "m.safetensors", note="kept")
    header = read_header(path)
    tensors = load_file(path)
    assert {name: spec.shape for name, spec in header.tensors.items()} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    assert header.metadata == {"note": "kept"}


def test_a_built_header_is_read_by_the_safetensors_library(tmp_path):
    specs = (
        TensorSpec("wide", "F32", (3,)),
        TensorSpec("narrow", "U8", (5,)),
        TensorSpec("none", "U8", (0, 4)),
    )
    header, offsets = build_header(specs, {"b": "2", "a": "1"})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        header + torch.arange(3, dtype=torch.float32).numpy().tobytes() + bytes(range(5))
    )
    assert offsets["narrow"] == len(header) + 12
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}
        assert file.get_tensor("narrow").tolist() == [0, 1, 2, 3, 4]
        assert file.get_tensor("none").shape == (0, 4)
