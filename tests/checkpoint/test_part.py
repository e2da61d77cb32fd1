"""Files that appear whole or not at all, and what killed processes leave."""

import os
import signal
import subprocess
import sys

import pytest

from fewbits.quant_ops import doors, part
from fewbits.quant_ops.part import PartFile, remove_leftovers, write_whole
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.helpers import tiny_checkpoint

INT8 = Recipe(primary=parse_wish("int8_tensorwise"), preset="none")
NAME = ".fewbits-0123456789abcdef.part"


def test_a_part_becomes_its_target_or_nothing(tmp_path):
    target = tmp_path / "t"
    target.write_bytes(b"old")
    first = PartFile(target)
    first.raw.write(b"new")
    assert target.read_bytes() == b"old" and first.path.parent == tmp_path
    first.publish()
    assert target.read_bytes() == b"new" and os.listdir(tmp_path) == ["t"]
    second = PartFile(target)
    second.raw.write(b"newer")
    second.discard()
    assert target.read_bytes() == b"new" and os.listdir(tmp_path) == ["t"]


def test_a_dead_writers_part_is_removed_and_a_living_ones_stays(tmp_path):
    living = PartFile(tmp_path / "t")
    left = tmp_path / NAME
    left.write_bytes(b"x" * 1000)
    assert remove_leftovers(tmp_path) == [left]
    assert living.path.exists() and not left.exists()
    living.raw.write(b"whole")
    living.publish()
    assert (tmp_path / "t").read_bytes() == b"whole"


def test_only_names_of_ours_are_removed(tmp_path):
    names = [
        ".q.safetensors.1a2b3c4d.part", ".fewbits-0123456789abcdef.part.bak", "fewbits-0123456789abcdef.part",
        ".fewbits-0123456789ABCDEF.part", ".fewbits-.part", "m.part",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / NAME).mkdir()
    assert remove_leftovers(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == sorted([*names, NAME])
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_a_part_taken_for_a_leftover_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, calls = part._lock, []

    def late(descriptor):
        if not calls:  # another process looks just between making and locking
            calls.append(lock(os.open(next(tmp_path.iterdir()), os.O_RDWR)))
        return lock(descriptor)

    monkeypatch.setattr(part, "_lock", late)
    made = PartFile(tmp_path / "t")
    assert calls == [True] and made.path.exists()
    made.raw.write(b"whole")
    made.publish()
    assert (tmp_path / "t").read_bytes() == b"whole"


def test_the_next_conversion_into_a_folder_removes_what_a_killed_one_left(tmp_path):
    model = tiny_checkpoint(tmp_path / "m.safetensors", {"a.weight": (64, 64)})
    (tmp_path / "out").mkdir()
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from fewbits.quant_ops.part import PartFile\n"
        f"part = PartFile(Path({str(tmp_path / 'out' / 'q.safetensors')!r}))\n"
        "part.raw.write(b'x' * 1000)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "out").iterdir()
    assert part.NAME.fullmatch(left.name) and left.stat().st_size == 1000
    doors.quantize_file(model, tmp_path / "out" / "q.safetensors", INT8)
    assert os.listdir(tmp_path / "out") == ["q.safetensors"]


def test_a_text_is_replaced_whole_and_not_through_its_links(tmp_path):
    original, hard, soft = tmp_path / "recipe.toml", tmp_path / "hard.toml", tmp_path / "soft.toml"
    original.write_bytes(b"old")
    os.link(original, hard)
    soft.symlink_to(original)
    for link in (hard, soft):
        write_whole(link, b"new")
        assert link.read_bytes() == b"new" and not link.is_symlink()
        assert original.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 3


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "recipe.toml"
    target.write_bytes(b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_whole(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["recipe.toml"]
