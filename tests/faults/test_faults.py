"""Faults while a file is written: whatever happens, the target is whole or as it was, and nothing stays behind.

A short slice runs always; `python3 dev.py test --faults` runs every step and 500 kills.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fewbits.quant_ops import doors
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.part import NAME, remove_leftovers
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.helpers import flux_shapes, tiny_checkpoint

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are put into forked processes"),
]
RECIPE = Recipe(primary=parse_wish("float8_e4m3fn"), preset="none")
SHAPES = {f"blocks.{i}.weight": (64, 64) for i in range(4)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("in") / "m.safetensors", SHAPES)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The bytes of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "q.safetensors"
    doors.quantize_file(model, out, RECIPE)
    return out.read_bytes()


def in_child(work) -> int:
    """Run in a forked process; returns how it ended, as `os.waitstatus_to_exitcode` says it."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # threads of the parent's pool do not live on
        try:
            work()
            os._exit(0)
        except CheckpointError:
            os._exit(2)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def quantize_alone(model, out) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    doors.quantize_file(model, out, RECIPE)


# what the interpreter says of a writer's calls, from the first file it opens to the last rename
AUDITED = {"open", "os.rename", "os.truncate", "fcntl.flock", "os.remove", "os.scandir"}


def die_after(steps: int) -> None:
    """Kill this process at its `steps`-th system call of a writer."""
    counts = iter(range(steps))

    def hook(event: str, arguments: tuple) -> None:
        wanted = event in AUDITED
        if wanted and threading.main_thread().is_alive() and next(counts, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_kill_at_every_step_leaves_the_old_file_or_the_whole_new_one(
    model, whole, tmp_path, all_faults
):
    """Steps are the calls that the interpreter audits; between them the random kills below fall."""
    out = tmp_path / "q.safetensors"
    statuses = []
    for steps in range(0, 200, 1 if all_faults else 3):
        out.write_bytes(b"old")

        def work(steps=steps):
            die_after(steps)
            doors.quantize_file(model, out, RECIPE, overwrite=True)

        statuses.append(in_child(work))
        assert out.read_bytes() in (b"old", whole)
        remove_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["q.safetensors"]
        if statuses[-1] == 0:
            break
    assert statuses[-1] == 0 and set(statuses[:-1]) == {-signal.SIGKILL} and len(statuses) > 3


def test_random_kills_leave_no_partial_file_and_nothing_after_the_next_start(
    tmp_path, all_faults, capsys
):
    """Kills spread over the whole run of a larger model, from a server that has torch loaded."""
    (tmp_path / "in").mkdir()
    large = tiny_checkpoint(tmp_path / "in" / "m.safetensors", flux_shapes(hidden=512))
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "q.safetensors"
    started = time.perf_counter()
    doors.quantize_file(large, out, RECIPE)
    seconds, complete = time.perf_counter() - started, out.read_bytes()
    context = multiprocessing.get_context("fork")
    dice = random.Random(time.time_ns() if all_faults else 0)
    kills = 500 if all_faults else 10
    left = finished = 0
    for _ in range(kills):
        out.unlink(missing_ok=True)
        process = context.Process(target=quantize_alone, args=(large, out))
        process.start()
        time.sleep(dice.uniform(0, 1.2) * seconds)
        process.kill()
        process.join()
        finished += out.exists()
        assert not out.exists() or out.read_bytes() == complete
        parts = [path for path in folder.iterdir() if path != out]
        assert all(NAME.fullmatch(path.name) for path in parts)
        left += len(parts)
    if all_faults:
        with capsys.disabled():
            print(f"\n{kills} kills: {finished} after the end, {left} parts found, 0 partial files")
    doors.quantize_file(large, out, RECIPE, overwrite=True)  # the next start
    assert os.listdir(folder) == ["q.safetensors"] and out.read_bytes() == complete


def limited(size: int) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_at_any_byte_keeps_the_old_file(model, whole, tmp_path, all_faults):
    out = tmp_path / "q.safetensors"
    out.write_bytes(b"old")
    for size in range(0, len(whole), len(whole) // (60 if all_faults else 6)):

        def work(size=size):
            limited(size)
            doors.quantize_file(model, out, RECIPE, overwrite=True)

        assert in_child(work) == 2
        assert out.read_bytes() == b"old" and os.listdir(tmp_path) == ["q.safetensors"]


@pytest.mark.parametrize("error", ["EROFS", "EACCES", "EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_system_that_refuses_to_finish_keeps_the_old_file(
    model, tmp_path, call, error, monkeypatch
):
    import errno

    out = tmp_path / "q.safetensors"
    out.write_bytes(b"old")

    def fail(*arguments):
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(
        CheckpointError, match="q.safetensors: (cannot be written|the disk is full)"
    ):
        doors.quantize_file(model, out, RECIPE, overwrite=True)
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == ["q.safetensors"]


def test_two_writers_of_one_target_leave_one_whole_file(model, whole, tmp_path, all_faults):
    out = tmp_path / "q.safetensors"
    for _ in range(20 if all_faults else 3):
        with ThreadPoolExecutor(3) as pool:
            runs = [
                pool.submit(doors.quantize_file, model, out, RECIPE, overwrite=True)
                for _ in range(3)
            ]
            for run in runs:
                run.result()
        assert out.read_bytes() == whole and os.listdir(tmp_path) == ["q.safetensors"]


def test_a_second_writer_that_may_not_overwrite_is_refused_and_the_first_file_stays(
    model, whole, tmp_path
):
    out = tmp_path / "q.safetensors"
    begun = threading.Event()

    def on_progress(*progress):
        if not begun.is_set():
            begun.set()
            doors.quantize_file(model, out, RECIPE)  # another one is quicker

    with pytest.raises(CheckpointError, match="exists already"):
        doors.quantize_file(model, out, RECIPE, on_progress=on_progress)
    assert out.read_bytes() == whole and os.listdir(tmp_path) == ["q.safetensors"]


def test_the_output_may_lie_on_another_file_system(model, whole):
    import tempfile

    memory = "/dev/shm"
    if not os.access(memory, os.W_OK) or os.stat(memory).st_dev == os.stat(model).st_dev:
        pytest.skip("no second file system that can be written")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        doors.quantize_file(model, os.path.join(folder, "q.safetensors"), RECIPE)
        assert os.listdir(folder) == ["q.safetensors"]
        with open(os.path.join(folder, "q.safetensors"), "rb") as file:
            assert file.read() == whole
