"""Layers computed side by side: same bytes, same errors, cancelled at once, and torch's threads as before."""

import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops import pipeline, workers
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

LAYERS = 8


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{i}.{j}.weight": torch.randn(96 + i, 640, generator=generator)
        for i in range(LAYERS)
        for j in "ab"
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def quantize(model, name, **options):
    out = model.with_name(name)
    report = quantize_file(model, out, Recipe(parse_wish("int8_tensorwise")), **options)
    return out, report


def test_layers_side_by_side_give_the_bytes_of_one_after_the_other(model, monkeypatch):
    names = set()
    convert = pipeline._convert
    monkeypatch.setattr(
        pipeline,
        "_convert",
        lambda *args: (names.add(threading.current_thread().name), convert(*args))[1],
    )
    many, report = quantize(model, "many.safetensors")
    assert len(names) == workers.LAYERS and all(name.startswith("fewbits-layer") for name in names)
    names.clear()
    monkeypatch.setattr(workers, "LAYERS", 3)  # more than there are threads
    one, alone = quantize(model, "one.safetensors")
    assert names == {threading.current_thread().name}
    assert many.read_bytes() == one.read_bytes()
    assert [result.name for result in report.results] == [result.name for result in alone.results]
    assert report.rel_l2() == pytest.approx(alone.rel_l2(), rel=1e-6)


def test_the_first_damaged_layer_is_named_and_nothing_is_left(model):
    from safetensors.torch import load_file

    tensors = load_file(model)
    for name in ("blocks.2.a.weight", "blocks.2.b.weight", "blocks.5.a.weight"):
        tensors[name][3, 3] = torch.nan
    save_file(tensors, model)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.a\.weight.* 1 NaN"):
        quantize(model, "out.safetensors")
    assert [path.name for path in model.parent.iterdir()] == [model.name]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fewbits")]


@pytest.mark.parametrize("waiting", [1, 4])
def test_however_many_layers_wait_the_first_that_cannot_be_written_ends_the_conversion(
    model, monkeypatch, waiting
):
    monkeypatch.setattr(pipeline, "MAY_WAIT", {False: waiting, True: waiting})
    quantize(model, "out.safetensors")
    written = []
    write = pipeline._write

    def fail_later(sink, outputs):
        if len(written) >= 3:
            raise CheckpointError(f"no room for {next(iter(outputs))}")
        written.append(next(iter(outputs)))
        write(sink, outputs)

    monkeypatch.setattr(pipeline, "_write", fail_later)
    with pytest.raises(CheckpointError, match=r"no room for blocks\.1\.b\."):
        quantize(model, "more.safetensors")
    assert sorted(path.name for path in model.parent.iterdir()) == [model.name, "out.safetensors"]


def test_cancelling_ends_a_long_layer_between_its_steps(model, monkeypatch):
    class Cancelled(Exception):
        pass

    started = threading.Event()

    def endless(file, layer, tensors, conditions, step):
        started.set()
        for _ in range(600):
            time.sleep(0.05)
            step()
        raise AssertionError("was not cancelled")

    def cancel(done, total, layer):
        if started.is_set():
            raise Cancelled

    monkeypatch.setattr(pipeline, "_convert", endless)
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        quantize(model, "out.safetensors", on_progress=cancel)
    assert time.monotonic() - begun < 10  # 30 s of layers were ahead
    assert not model.with_name("out.safetensors").exists()


def test_workers_share_the_callers_inference_mode(model, monkeypatch):
    seen = set()
    convert = pipeline._convert
    monkeypatch.setattr(
        pipeline,
        "_convert",
        lambda *args: (seen.add(torch.is_inference_mode_enabled()), convert(*args))[1],
    )
    quantize(model, "plain.safetensors")
    with torch.inference_mode():
        quantize(model, "inference.safetensors")
    assert seen == {False, True}


def test_progress_names_every_layer_in_order_and_never_goes_back(model):
    calls = []
    quantize(model, "out.safetensors", on_progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    names = list(dict.fromkeys(name for *_, name in calls if name))
    assert done == sorted(done) and calls[-1] == (done[-1], done[-1], "")
    assert len(names) == 2 * LAYERS
