"""Faults while a file is written: whatever happens, the target is whole or as it was, and nothing stays behind.

A short slice runs always; `python3 dev.py test --faults` runs every step and 500 kills.
"""

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops import doors, pipeline
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.cli.__main__ import main
from fewbits.quant_ops.doors.problems import checked_sink
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.part import NAME, remove_leftovers
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.report.file import report_path
from fewbits.quant_ops.sources import MemorySource
from support.dialects import scaled_fp8
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


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


def save_model(source, out) -> int:
    """What Save comfy_quant does with the tensors of a MODEL."""
    tensors = load_file(source)
    pipeline.rewrite(MemorySource(tensors, name="MODEL"), checked_sink(out))
    return 0


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """name -> (work that takes the output's path, bytes of an undisturbed run, its seconds)."""
    folder = tmp_path_factory.mktemp("jobs")
    shapes = flux_shapes(hidden=256)
    plain = str(tiny_checkpoint(folder / "plain.safetensors", shapes))
    scaled = str(folder / "scaled.safetensors")
    layers = {}
    for name, weight in load_file(plain).items():
        wide = name.endswith(".weight") and weight.dim() == 2
        layers |= scaled_fp8(name[:-7], weight.float()) if wide else {name: weight}
    save_file(layers, scaled)
    commands = {
        "quantize": ["quantize", plain, "--format", "int8_tensorwise", "--preset", "none"],
        "convert": ["convert", scaled],
        "repair": ["repair", scaled],
    }
    work = {name: partial(run_main, words) for name, words in commands.items()}
    work["save"] = partial(save_model, scaled)
    made = {}
    for name, run in work.items():
        out = folder / f"{name}.safetensors"
        started = time.perf_counter()
        assert in_child(lambda run=run, out=out: run(out)) == 0
        made[name] = run, out.read_bytes(), time.perf_counter() - started
    return made


def run_main(words, out) -> int:
    return main([*words, "-o", str(out), "--quiet"])


def test_random_kills_leave_no_partial_file_and_nothing_after_the_next_start(
    jobs, tmp_path, all_faults, capsys
):
    """KILL, TERM and HUP at random moments of quantize, convert, repair and save, in processes
    forked from this one, which has everything imported.
    """
    dice = random.Random(time.time_ns() if all_faults else 0)
    count = 500 if all_faults else 12
    ends = Counter()
    out = tmp_path / "q.safetensors"
    for trial in range(count):
        name = list(jobs)[trial % len(jobs)]
        number = SIGNALS[trial // len(jobs) % len(SIGNALS)]
        work, whole, seconds = jobs[name]
        out.unlink(missing_ok=True)
        report_path(out).unlink(missing_ok=True)
        ended_by_itself, left = disturbed(work, out, number, dice.uniform(0, 1.1) * seconds)
        assert not out.exists() or out.read_bytes() == whole, (name, number)
        assert out.exists() or not report_path(out).exists(), (name, number)
        assert all(NAME.fullmatch(part) for part in left), (name, left)
        cleans_up = number != signal.SIGKILL and name != "save"
        assert not (cleans_up and left), (name, number, left)
        ends[f"{number.name} found parts"] += bool(left)
        ends["over before the kill"] += ended_by_itself
        ends["whole files"] += out.exists()
        if left:  # the next start removes them
            assert in_child(lambda work=work: work(out)) == 0
            others = set(os.listdir(tmp_path)) - {report_path(out).name}
            assert others == {out.name} and out.read_bytes() == whole
    if all_faults:
        with capsys.disabled():
            said = ", ".join(f"{name}: {value}" for name, value in sorted(ends.items()))
            print(f"\n{count} kills, 0 partial files, 0 leftovers after the next start; {said}")


def disturbed(work, out, number, seconds) -> tuple[bool, list[str]]:
    """Run in a forked process and kill it; whether it was over before, and what else is there."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = 99
        try:
            status = work(out)
        finally:
            os._exit(status)
    time.sleep(seconds)
    ended, status = os.waitpid(pid, os.WNOHANG)
    over = ended == pid
    assert not over or status == 0
    if not over:
        os.kill(pid, number)
        os.waitpid(pid, 0)
    wanted = {out.name, report_path(out).name}
    return over, [name for name in os.listdir(out.parent) if name not in wanted]


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


@pytest.mark.parametrize("at", ["the weight", "the codes"])
def test_a_layer_that_a_gpu_has_no_memory_for_is_computed_on_the_cpu_and_that_is_said(
    model, whole, tmp_path, monkeypatch, at
):
    """The device is the CPU under another name: a type that no layer but one fits into."""
    large = "blocks.2"

    def encoded(file, layer, weight, conditions, **others):
        if conditions.device.type != "cpu" and layer.name == large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        conditions = replace(conditions, device=torch.device("cpu"))
        return pipeline_encoded(file, layer, weight, conditions, **others)

    moved = torch.Tensor.to

    def to(tensor, *arguments, **others):
        if arguments and arguments[0] == torch.device("cuda"):
            if at == "the weight":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return tensor
        return moved(tensor, *arguments, **others)

    pipeline_encoded = pipeline._encoded
    monkeypatch.setattr(pipeline, "_encoded", encoded)
    monkeypatch.setattr(torch.Tensor, "to", to)
    out = tmp_path / "q.safetensors"
    report = pipeline_run(model, out)
    assert out.read_bytes() == whole
    names = ", ".join(f"blocks.{i}" for i in range(3))
    said = (
        f"4 layers did not fit into the memory of cuda and were computed on the CPU: {names}, ..."
    )
    if at == "the codes":
        said = f"1 layers did not fit into the memory of cuda and were computed on the CPU: {large}"
    assert said in report.plan.warnings and f"note: {said}" in report.to_text()


def pipeline_run(model, out):
    with FileSource(model) as source:
        return pipeline.quantize(source, checked_sink(out), RECIPE, device="cuda")


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
