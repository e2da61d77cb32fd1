"""`verify` of the file doors: the reference decoder shares no code with the writers, and decides before publishing."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops import doors, reference
from fewbits.quant_ops.checkpoint import second_reading
from fewbits.quant_ops.errors import CheckpointError, RecipeError
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.recipe import Recipe
from fewbits.quant_ops.planning.wish import Wish
from support import dialects
from support.codec import CANONICAL, wish
from support.helpers import tiny_checkpoint
from support.hostile import WEIGHT


def test_the_reference_decoder_imports_nothing_of_ours_and_no_torch():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.partition(".")[0])
    assert names - sys.stdlib_module_names == {"numpy"}


@pytest.mark.parametrize("case", CANONICAL)
def test_every_format_is_read_alike_by_both_decoders(tmp_path, case):
    name, options = wish(case)
    model = tiny_checkpoint(
        tmp_path / "m.safetensors", {"a.weight": (256, 512), "b.weight": (64, 256)}
    )
    recipe = Recipe(Wish(name, options), preset="none")
    report = doors.quantize_file(model, tmp_path / "q.safetensors", recipe, verify=True)
    assert name in {layer.format for layer in report.plan.layers}


def test_a_converted_file_is_read_alike(tmp_path):
    save_file(dialects.bitsandbytes("a", WEIGHT), tmp_path / "m.safetensors")
    doors.convert_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", verify=True)
    with pytest.raises(RecipeError, match="verify reads comfy_quant files, not bf16"):
        doors.convert_file(
            tmp_path / "m.safetensors", tmp_path / "b.safetensors", to="bf16", verify=True
        )


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_decoder_has_every_format(name):
    assert name in reference.DECODERS, f"quant_ops/reference.py cannot decode {name}"


def test_a_format_without_a_decoder_is_refused_by_name():
    with pytest.raises(ValueError, match="no decoder for 'toy'"):
        reference.decode({"format": "toy"}, {})


def test_a_repaired_file_is_read_alike_besides_layers_whose_scale_was_lost(tmp_path):
    """What the source has lost cannot be decoded by anybody, and was told."""
    tensors = dialects.under("a", *dialects.native("int8_tensorwise", WEIGHT))
    codes = (WEIGHT / WEIGHT.abs().max() * 448).to(torch.float8_e4m3fn)
    tensors |= dialects.under("b", {"weight": codes}, {"format": "float8_e4m3fn"})
    save_file(tensors, tmp_path / "m.safetensors")
    done = doors.repair_file(tmp_path / "m.safetensors", tmp_path / "q.safetensors", verify=True)
    assert {finding.layer for finding in done.left} == {"b"}


@pytest.mark.parametrize("door", ["convert", "repair"])
def test_the_other_doors_refuse_what_is_read_differently(tmp_path, door, monkeypatch):
    monkeypatch.delenv("FEWBITS_VERIFY")
    monkeypatch.setattr(second_reading, "decode", lambda *given: reference.decode(*given) * 2)
    source, out = tmp_path / "m.safetensors", tmp_path / "q.safetensors"
    save_file(dialects.bitsandbytes("a", WEIGHT), source)
    run = {"convert": doors.convert_file, "repair": doors.repair_file}[door]
    with pytest.raises(CheckpointError, match="reads other weights than ours"):
        run(source, out, verify=True)
    assert os.listdir(tmp_path) == ["m.safetensors"]
    run(source, out)
    assert out.exists()


WRONG = {
    "other values": lambda decode: lambda *given: decode(*given) * 1.001,
    "one row": lambda decode: lambda *given: decode(*given)[::-1],
    "another shape": lambda decode: lambda *given: decode(*given)[:1],
    "unreadable": lambda decode: lambda *given: decode({"format": "unknown"}, {"weight": None}),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_file_that_is_read_differently_is_not_published(tmp_path, change, monkeypatch):
    (tmp_path / "in").mkdir()
    model = tiny_checkpoint(tmp_path / "in" / "m.safetensors", {"a.weight": (64, 64)})
    out = tmp_path / "q.safetensors"
    out.write_bytes(b"old")
    monkeypatch.setattr(second_reading, "decode", change(reference.decode))
    recipe = Recipe(Wish("int8_tensorwise"), preset="none")
    with pytest.raises(
        CheckpointError, match="^q.safetensors: .*the reference decoder.*nothing is kept"
    ):
        doors.quantize_file(model, out, recipe, overwrite=True, verify=True)
    assert out.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["in", "q.safetensors"]


def test_the_command_has_the_switch(tmp_path, monkeypatch, capsys):
    from fewbits.quant_ops.cli.__main__ import main

    model = tiny_checkpoint(tmp_path / "m.safetensors", {"a.weight": (64, 64)})
    monkeypatch.setattr(second_reading, "decode", lambda *given: reference.decode(*given) * 2)
    arguments = [
        "quantize",
        model,
        "-o",
        tmp_path / "q.safetensors",
        "--format",
        "mxfp8",
        "--preset",
        "none",
    ]
    monkeypatch.delenv("FEWBITS_VERIFY")  # as for every test; here the switch decides
    assert main([*map(str, arguments), "--verify"]) == 2
    assert "reads other weights than ours" in capsys.readouterr().err
    assert main(list(map(str, arguments))) == 0
