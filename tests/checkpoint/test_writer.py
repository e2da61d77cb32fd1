"""Output appears complete or not at all."""

import errno
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fewbits.quant_ops import pipeline
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.checkpoint.writer import FileSink
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.helpers import tiny_checkpoint

INT8 = Recipe(primary=parse_wish("int8_tensorwise"))


@pytest.fixture
def model(tmp_path):
    (tmp_path / "in").mkdir()
    return tiny_checkpoint(tmp_path / "in" / "m.safetensors")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "q.safetensors"


def test_the_file_is_what_the_plan_said_to_the_byte(model, out):
    report = quantize_file(model, out, INT8)
    with FileSource(out) as written:
        assert list(written.header.tensors) == [spec.name for spec in report.plan.outputs]
        assert tuple(written.header.tensors.values()) == report.plan.outputs
        assert written.header.metadata == report.plan.metadata
    assert load_file(out).keys() == {spec.name for spec in report.plan.outputs}


def test_kept_tensors_are_copied_bit_for_bit(model, out):
    quantize_file(model, out, INT8)
    before, after = load_file(model), load_file(out)
    kept = [name for name in before if not name.endswith(".weight") or f"{name}_scale" not in after]
    assert len(kept) > 30
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
        for name in kept
    )


def test_an_existing_output_is_refused_and_untouched(model, out):
    out.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="exists already"):
        quantize_file(model, out, INT8)
    assert out.read_bytes() == b"precious"
    quantize_file(model, out, INT8, overwrite=True)
    assert out.stat().st_size > 1000


def test_a_failed_overwrite_keeps_the_old_file(model, out):
    out.write_bytes(b"precious")

    def cancel(done, total, layer):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(model, out, INT8, overwrite=True, on_progress=cancel)
    assert out.read_bytes() == b"precious"
    assert os.listdir(out.parent) == ["q.safetensors"]


def test_a_cancelled_run_leaves_an_empty_folder(model, out):
    seen = []

    def cancel(done, total, layer):
        seen.append(layer)
        if len(seen) == 5:
            raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        quantize_file(model, out, INT8, on_progress=cancel)
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing/q.safetensors", "no such folder"),
        ("q.ckpt", "must end in .safetensors"),
        ("in", "must end in"),
    ],
    ids=["missing folder", "wrong suffix", "a folder"],
)
def test_an_impossible_target_is_refused_before_any_work(tmp_path, model, target, message):
    with pytest.raises(CheckpointError, match=message):
        quantize_file(model, tmp_path / target, INT8)


def test_an_unwritable_folder_is_refused(model, out, monkeypatch):
    # root may write anywhere, so the answer of the system is given here instead of a chmod
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    with pytest.raises(CheckpointError, match="not writable"):
        quantize_file(model, out, INT8)


def test_a_full_disk_is_noticed_before_the_first_byte(model, out, monkeypatch):
    import shutil

    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        CheckpointError, match="the disk is full: .* bytes are needed in .*, 1000 are free"
    ):
        quantize_file(model, out, INT8)
    assert os.listdir(out.parent) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_while_writing_names_the_tensor(model, out):
    """A real write error of the kernel: the process may not write files beyond 200 kB."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from fewbits.quant_ops.cli.__main__ import main;"
        f"sys.exit(main(['quantize', {str(model)!r}, '-o', {str(out)!r}, '--format', 'int8_tensorwise']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000
    assert result.returncode == 2
    assert (
        result.stderr.count("\n") == 1
        and "the disk is full" in result.stderr
        and "q.safetensors" in result.stderr
    )
    assert os.listdir(out.parent) == []


def test_enospc_is_told_with_the_tensor(model, out, monkeypatch):
    def fail(self, view):
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = FileSink(out)
    with FileSource(model) as source:
        plan = pipeline.plan_source(source, INT8)
        sink.open(plan)
        monkeypatch.setattr(FileSink, "_put", fail)
        with pytest.raises(CheckpointError, match="tensor 'img_in.weight': the disk is full"):
            sink.write("img_in.weight", source.read("img_in.weight"))
    sink.abort()
    assert os.listdir(out.parent) == []


def test_a_tensor_of_another_shape_or_dtype_is_never_written(model, out):
    sink = FileSink(out)
    with FileSource(model) as source:
        sink.open(pipeline.plan_source(source, INT8))
        with pytest.raises(CheckpointError, match="was planned as BF16"):
            sink.write("img_in.weight", torch.zeros(3))
    sink.abort()


def test_commit_refuses_a_file_with_holes(model, out):
    sink = FileSink(out)
    with FileSource(model) as source:
        sink.open(pipeline.plan_source(source, INT8))
        with pytest.raises(CheckpointError, match="tensors were never written"):
            sink.commit()
    sink.abort()
    assert os.listdir(out.parent) == []


def test_two_runs_are_byte_identical(model, tmp_path, out):
    quantize_file(model, out, INT8)
    again = tmp_path / "again.safetensors"
    quantize_file(model, again, replace(INT8))
    assert out.read_bytes() == again.read_bytes()
