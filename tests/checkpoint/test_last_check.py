"""A file that went wrong on its way to the disk is kept by no door: each fault is put into what every door writes."""

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops import pipeline
from fewbits.quant_ops.checkpoint.writer import FileSink
from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.compat import convert_fp8_scaled_to_comfy_quant, quantize
from fewbits.quant_ops.compat import main as classic
from fewbits.quant_ops.doors import convert_file, quantize_file, repair_file
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects

ROOT = Path(__file__).parents[2]
WEIGHT = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 16
LARGE = torch.randn(512, 512, generator=torch.Generator().manual_seed(1)) / 16


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch):
    """Without the reading of every byte that tests ask for."""
    monkeypatch.delenv("FEWBITS_VERIFY", raising=False)


@pytest.fixture
def inputs(tmp_path):
    plain = {"blocks.0.weight": LARGE, "n.bias": torch.ones(64).bfloat16()}
    scaled = dialects.scaled_fp8("a", WEIGHT) | {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}  # fmt: skip
    codes = dialects.bitsandbytes("a", WEIGHT) | plain
    found = {}
    for name, tensors in {"plain": plain, "scaled": scaled | plain, "bnb": codes}.items():
        found[name] = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, found[name])
    return found


def recipe(format="int8_tensorwise"):
    return Recipe(parse_wish(format), preset="none")


def command(run, *words):
    """A command's exit status as a refusal."""
    if status := run([*map(str, words)]):
        raise CheckpointError(f"exit status {status}")


DOORS = {
    "quantize": lambda files, out: quantize_file(files["plain"], out, recipe()),
    "quantize nvfp4": lambda files, out: quantize_file(files["plain"], out, recipe("nvfp4")),
    "requantize": lambda files, out: quantize_file(files["scaled"], out, recipe(), requantize=True),
    "convert": lambda files, out: convert_file(files["scaled"], out),
    "decode": lambda files, out: convert_file(files["scaled"], out, to="bf16"),
    "convert to bnb": lambda files, out: convert_file(files["bnb"], out, to="bnb"),
    "convert scaled": lambda files, out: convert_file(files["scaled"], out, only="fp8_scaled"),
    "repair": lambda files, out: repair_file(files["scaled"], out),
    "fewbits quantize": lambda files, out: command(main, "quantize", files["plain"], "-o", out, "--format", "fp8"),
    "fewbits convert": lambda files, out: command(main, "convert", files["scaled"], "-o", out),
    "fewbits repair": lambda files, out: command(main, "repair", files["scaled"], "-o", out),
    "convert_to_quant": lambda files, out: command(classic, "-i", files["plain"], "-o", out, "--int8", "--simple"),
    "convert_to_quant --convert-fp8-scaled": lambda files, out: command(classic, "-i", files["scaled"], "-o", out, "--convert-fp8-scaled"),
    "classic quantize": lambda files, out: quantize(input=files["plain"], output=out, int8=True, simple=True),
    "classic conversion": lambda files, out: convert_fp8_scaled_to_comfy_quant(files["scaled"], out),
}  # fmt: skip


def text(old, new):
    """A change of the header: as long as what it replaces."""

    def change(data):
        assert old in data
        return data.replace(old, new.ljust(len(old)), 1)

    return change


def at_end(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def at_start(data):
    start = 8 + int.from_bytes(data[:8], "little")
    return data[:start] + bytes([data[start] ^ 0x40]) + data[start + 1 :]


# "n.bias" stays BF16 in every door's output, "blocks.0" has 512 rows.
FAULTS = {
    "the first byte": at_start,
    "the last byte": at_end,
    "a code type": text(b'"BF16"', b'"F16"'),
    "a shape": text(b'"shape":[512,', b'"shape":[511,'),
    "a name": text(b"blocks.0", b"blocks.1"),
    "cut": lambda data: data[:-1],
    "too long": lambda data: data + b"\0",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("door", DOORS)
def test_a_fault_of_the_disk_is_seen_and_nothing_kept(
    door, fault, inputs, tmp_path, monkeypatch, capsys
):
    out, commit = tmp_path / "out.safetensors", FileSink.commit

    def damaged(sink, *given):
        path = sink._part.path
        path.write_bytes(FAULTS[fault](path.read_bytes()))
        commit(sink, *given)

    monkeypatch.setattr(FileSink, "commit", damaged)
    with pytest.raises(CheckpointError):
        DOORS[door](inputs, out)
    assert sorted(tmp_path.iterdir()) == sorted(inputs.values())


def twice(name, tensor):
    return tensor * 2 if tensor.dtype == torch.float32 and "scale" in name else tensor


def other_codes(name, tensor):
    codes = tensor.dtype in (torch.int8, torch.uint8) and name.endswith(".weight")
    return tensor.roll(1, 1) ^ 0x11 if codes else tensor


def other_marker(name, tensor):
    return tensor.flip(0) if name.endswith(".comfy_quant") else tensor


CHANGES = {
    "scales twice as large": twice,
    "other codes": other_codes,
    "another label": other_marker,
}
MAKERS = ("quantize", "quantize nvfp4", "requantize", "classic quantize")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("door", MAKERS)
def test_a_tensor_that_is_not_what_was_made_is_seen_and_nothing_kept(
    door, change, inputs, tmp_path, monkeypatch
):
    out, write = tmp_path / "out.safetensors", pipeline._write

    def changed(sink, outputs):
        write(sink, {name: CHANGES[change](name, tensor) for name, tensor in outputs.items()})

    monkeypatch.setattr(pipeline, "_write", changed)
    with pytest.raises(CheckpointError):
        DOORS[door](inputs, out)
    assert sorted(tmp_path.iterdir()) == sorted(inputs.values())


def calls(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]  # fmt: skip


def test_every_door_that_writes_a_model_has_the_check():
    """One place makes sinks that write files; doors and nodes get theirs from it."""
    sources = [path for folder in ("quant_ops", "nodes") for path in (ROOT / folder).rglob("*.py")]
    makers = {path.relative_to(ROOT).as_posix() for path in sources if "FileSink" in calls(path)}
    assert makers == {"quant_ops/doors/problems.py"}
    users = {path.relative_to(ROOT).as_posix() for path in sources if "checked_sink" in calls(path)}
    doors = ("convert", "quantize", "repair")
    assert users == {*(f"quant_ops/doors/{door}.py" for door in doors), "nodes/save.py"}
