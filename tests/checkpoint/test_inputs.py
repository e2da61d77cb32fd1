"""What is read is never written to, and what changes while it is read is not published."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops import doors
from fewbits.quant_ops.checkpoint.importers import ImportOptions
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects
from support.helpers import random_tensors, tiny_checkpoint

INT8 = Recipe(primary=parse_wish("int8_tensorwise"), preset="none")
SHAPES = {"a.weight": (64, 64), "b.weight": (64, 32)}
DOORS = {
    "quantize": lambda source, out, **options: doors.quantize_file(source, out, INT8, **options),
    "convert": doors.convert_file,
    "to bf16": lambda source, out, **options: doors.convert_file(source, out, to="bf16", **options),
    "repair": doors.repair_file,
}
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def shards(folder: Path) -> Path:
    """Two shards and their index."""
    names = {}
    for name, tensor in random_tensors(SHAPES).items():
        names[name] = f"model-{name[0]}.safetensors"
        save_file({name: tensor}, folder / names[name])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return index


def aliases(folder: Path, file: Path) -> dict[str, Path]:
    """Other names of a file in `folder`; each leads to it."""
    (folder / "linked").symlink_to(folder, target_is_directory=True)
    (folder / "symbolic.safetensors").symlink_to(file)
    os.link(file, folder / "hard.safetensors")
    return {
        "itself": file,
        "by a linked folder": folder / "linked" / file.name,
        "by a symbolic link": folder / "symbolic.safetensors",
        "by a hard link": folder / "hard.safetensors",
        "by dots": folder / ".." / folder.name / file.name,
    }


@every_door
def test_no_name_of_the_input_is_an_output(tmp_path, door):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    before = model.read_bytes()
    for target in aliases(tmp_path, model).values():
        with pytest.raises(CheckpointError, match="an input is never changed: name another file"):
            door(model, target, overwrite=True)
        assert target.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@every_door
@pytest.mark.parametrize("whole", [False, True], ids=["index", "folder"])
def test_no_shard_of_the_input_is_an_output(tmp_path, door, whole):
    index = shards(tmp_path)
    for target in sorted(tmp_path.glob("*.safetensors")):
        before = target.read_bytes()
        with pytest.raises(CheckpointError, match="an input is never changed"):
            door(tmp_path if whole else index, target, overwrite=True)
        assert target.read_bytes() == before


def test_the_file_that_says_the_shapes_is_no_output(tmp_path):
    from fewbits.quant_ops.cli.__main__ import main

    original = tiny_checkpoint(tmp_path / "original.safetensors", SHAPES)
    before = original.read_bytes()
    save_file(dialects.d14("a", torch.randn(64, 64)), tmp_path / "flat.safetensors")
    with FileSource(original) as opened:
        shapes = {name: spec.shape for name, spec in opened.header.tensors.items()}
        options = ImportOptions(shapes=shapes, files=opened.files)
    with pytest.raises(CheckpointError, match="an input is never changed"):
        doors.convert_file(tmp_path / "flat.safetensors", original, options=options, overwrite=True)
    arguments = ["convert", tmp_path / "flat.safetensors", "-o", original, "--overwrite"]
    assert main([*map(str, arguments), "--shapes-from", str(original)]) == 2
    assert original.read_bytes() == before


def test_another_file_is_still_overwritten(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    out = tiny_checkpoint(tmp_path / "q.safetensors", SHAPES)
    before = out.read_bytes()
    doors.quantize_file(model, out, INT8, overwrite=True)
    assert out.read_bytes() != before


def rewritten(path: Path) -> None:
    """Other bytes in the same file, of the same length."""
    state = path.stat()
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"changed!")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """Another file of the same name, size and time."""
    state, data = path.stat(), path.read_bytes()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def grown(path: Path) -> None:
    state = path.stat()
    with open(path, "ab") as file:
        file.write(b"more")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = {
    "rewritten in place": (rewritten, "changed while it was read .*time of change"),
    "replaced": (replaced, "changed while it was read .*place on the disk"),
    "grown": (grown, "changed while it was read .*size"),
    "deleted": (Path.unlink, "cannot be found any more"),
}


@every_door
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_an_input_that_changes_meanwhile_is_not_published(tmp_path, door, change, message):
    (tmp_path / "in").mkdir()
    model = tiny_checkpoint(tmp_path / "in" / "m.safetensors", SHAPES)
    done = []

    def on_progress(*progress):
        if not done:
            done.append(change(model))

    with pytest.raises(CheckpointError, match=message):
        door(model, tmp_path / "q.safetensors", on_progress=on_progress)
    assert done and os.listdir(tmp_path) == ["in"]


def test_an_input_deleted_before_it_is_read_is_an_error_of_ours(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    with FileSource(model) as source:
        model.unlink()
        with pytest.raises(CheckpointError, match="cannot be opened any more .No such file"):
            source.read("a.weight")


SPECIAL = ["pipe", "device", "folder"]


def special(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, kind):
    path = special(tmp_path / "m.safetensors", kind)
    found = f"is a {kind}" if kind != "folder" else "no .safetensors files"
    with pytest.raises(CheckpointError, match=found):
        FileSource(path)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "m.safetensors"}}')
    with pytest.raises(CheckpointError, match="missing"):
        FileSource(index)
    with pytest.raises(CheckpointError, match=found):
        FileSource(special(tmp_path / "y", kind).rename(tmp_path / "y.safetensors.index.json"))


def test_a_name_longer_than_the_system_takes_is_refused(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors", SHAPES)
    for name in ("x" * 300 + ".safetensors", "zero\0byte.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be a file's name"):
            doors.quantize_file(model, tmp_path / name, INT8)
        with pytest.raises(CheckpointError, match="cannot be read|not a file name"):
            FileSource(tmp_path / name)
    longest = tmp_path / ("x" * (255 - len(".safetensors")) + ".safetensors")
    doors.quantize_file(model, longest, INT8)
    assert longest.is_file()
