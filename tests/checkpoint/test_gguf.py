"""GGUF files in: every tensor as the gguf package decodes it, then any format of ours."""

import struct

import pytest
import torch
from safetensors.torch import load_file

from fewbits.quant_ops.checkpoint import gguf_source
from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.doors import convert_file, inspect_file, quantize_file
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

WIDE = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 16


@pytest.fixture
def write(tmp_path):
    """name -> (weight, kind) as a GGUF file; returns its path and what gguf decodes of each."""

    def run(tensors, shapes=None):
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "flux")
        truth = {}
        for name, (weight, kind) in tensors.items():
            type = gguf.GGMLQuantizationType[kind]
            stored = gguf.quants.quantize(weight.numpy(), type)
            writer.add_tensor(name, stored, raw_dtype=type)
            truth[name] = torch.from_numpy(gguf.quants.dequantize(stored, type)).float()
        for name, shape in (shapes or {}).items():
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, truth

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


MIXED = {
    "a.weight": (WIDE, "Q8_0"),
    "b.weight": (WIDE, "Q4_0"),
    "c.weight": (WIDE, "F16"),
    "d.bias": (WIDE[0], "F32"),
}


def test_a_gguf_file_is_decoded_to_bf16_and_keeps_plain_tensors(write, out):
    path, truth = write(MIXED)
    done = convert_file(path, out, to="bf16")
    stored = load_file(out)
    assert torch.equal(stored["a.weight"], truth["a.weight"].bfloat16())
    assert torch.equal(stored["b.weight"], truth["b.weight"].bfloat16())
    assert torch.equal(stored["c.weight"], WIDE.half()) and torch.equal(stored["d.bias"], WIDE[0])
    assert done.origins == {"gguf: Q8_0 decoded": 1, "gguf: Q4_0 decoded": 1}


def test_a_gguf_file_is_quantized_from_its_float32_values(write, out):
    path, truth = write(MIXED)
    quantize_file(path, out, Recipe(parse_wish("int8_tensorwise"), preset="none"))
    stored = load_file(out)
    for name in ("a", "b"):
        wanted, _ = dialects.native("int8_tensorwise", truth[f"{name}.weight"])
        assert torch.equal(stored[f"{name}.weight"], wanted["weight"])


def test_inspect_says_what_blocks_a_gguf_file_has(write, capsys):
    path, _ = write(MIXED)
    inspection = inspect_file(path)
    assert inspection.dialects == {"gguf: Q8_0 decoded": 1, "gguf: Q4_0 decoded": 1}
    assert "does not read it" in inspection.loads_in and inspection.findings == ()
    assert main(["plan", str(path), "--format", "float8_e4m3fn"]) == 0
    assert "float8_e4m3fn" in capsys.readouterr().out


def test_a_flattened_tensor_gets_its_own_shape_back(write, out):
    conv = torch.randn(16, 8, 2, 2)
    path, _ = write({"x.weight": (conv.reshape(16, 32), "F16")}, {"x.weight": [16, 8, 2, 2]})
    convert_file(path, out, to="bf16")
    assert torch.equal(load_file(out)["x.weight"], conv.half())


def test_what_cannot_be_read_is_refused_by_name(write, out, tmp_path, monkeypatch):
    for name in (
        "v.blk.0.attn_q.weight",
        "mm.0.weight",
        "enc.blk.0.ffn_up.weight",
        "token_embd.weight",
    ):
        path, _ = write({name: (WIDE, "Q8_0")})
        with pytest.raises(CheckpointError, match=f"under llama.cpp's names .'{name}'"):
            convert_file(path, out)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="broken.gguf: not a GGUF file, or damaged"):
        convert_file(broken, out)
    monkeypatch.setattr(gguf_source, "gguf", None)
    with pytest.raises(CheckpointError, match=r"need the package gguf \(pip install gguf\)"):
        inspect_file(path)


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def header(keys=b"", tensors=b"", key_count=0, tensor_count=0, version=3):
    return struct.pack("<4sIQQ", b"GGUF", version, tensor_count, key_count) + keys + tensors


def tensor(name, sizes, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def listed(key, count, kind=0):
    return text(key) + struct.pack("<IIQ", 9, kind, count)


SHAPE = "comfy.gguf.orig_shape.a"
HOSTILE = {
    "a list of 2^60 numbers": (header(listed("k", 1 << 60), key_count=1), "lie outside"),
    "a list of 2^60 texts": (header(listed("k", 1 << 60, 8), key_count=1), "lie outside"),
    "lists in lists": (header(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, key_count=1), "unknown type|nested"),
    "2^60 keys": (header(key_count=1 << 60), "lie outside"),
    "2^60 tensors": (header(tensor_count=1 << 60), "lie outside"),
    "a name of 2^60 bytes": (header(struct.pack("<Q", 1 << 60), key_count=1), "lie outside"),
    "a name that is no text": (header(struct.pack("<Q", 2) + b"\xff\xfe" + bytes(5), key_count=1), "codec"),
    "a key twice": (header((text("k") + struct.pack("<IB", 0, 1)) * 2, key_count=2), "'k' appears twice"),
    "an unknown type": (header(text("k") + struct.pack("<I", 99), key_count=1), "unknown type 99"),
    "another version": (header(version=1), "version 1; 2 and 3 are read"),
    "an alignment of 0": (header(text("general.alignment") + struct.pack("<II", 4, 0), key_count=1), "power of two"),
    "a tensor twice": (header(tensors=tensor("a", (4,)) * 2, tensor_count=2), "'a' appears twice"),
    "a tensor of 2^31 dimensions": (
        header(tensors=text("a") + struct.pack("<I", 1 << 31), tensor_count=1), "2147483648 dimensions"),
    "an unknown kind": (header(tensors=tensor("a", (4,), 999), tensor_count=1) + bytes(64), "kind 999"),
    "sizes of 2^63": (header(tensors=tensor("a", (1 << 63, 4)), tensor_count=1) + bytes(64), "no memory holds"),
    "half a block": (header(tensors=tensor("a", (33,), 8), tensor_count=1) + bytes(64), "blocks of 32"),
    "beyond the end": (header(tensors=tensor("a", (400,)), tensor_count=1) + bytes(64), "bytes up to"),
    "an offset of 2^63": (header(tensors=tensor("a", (4,), 0, 1 << 63), tensor_count=1) + bytes(64), "bytes up to"),
    "overlapping": (
        header(tensors=tensor("a", (4,)) + tensor("b", (4,)), tensor_count=2) + bytes(64), "bytes that 'a' has too"),
    "a negative shape": (
        header(listed(SHAPE, 2, 5) + struct.pack("<ii", -2, -2), tensor("a", (4,)), 1, 1) + bytes(64), "the shape"),
    "a shape of other size": (
        header(listed(SHAPE, 1, 5) + struct.pack("<i", 5), tensor("a", (4,)), 1, 1) + bytes(64), "needs 5"),
    "a shape of fractions": (
        header(listed(SHAPE, 1, 6) + struct.pack("<f", 4.0), tensor("a", (4,)), 1, 1) + bytes(64), "the shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path, case):
    """The package's own reader follows the first two for ever, with memory that grows."""
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"hostile.gguf: .*({message})"):
        inspect_file(path)
