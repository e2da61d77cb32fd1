"""GGUF files in: every tensor as the gguf package decodes it, then any format of ours."""

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
    path, _ = write({"token_embd.weight": (WIDE, "Q8_0")})
    with pytest.raises(CheckpointError, match="text encoder under llama.cpp's names"):
        convert_file(path, out)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="broken.gguf: not a GGUF file, or damaged"):
        convert_file(broken, out)
    monkeypatch.setattr(gguf_source, "gguf", None)
    with pytest.raises(CheckpointError, match=r"need the package gguf \(pip install gguf\)"):
        inspect_file(path)
