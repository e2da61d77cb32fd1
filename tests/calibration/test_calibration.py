"""What is collected, what the file holds, and which files are refused."""

import gc
import json
import weakref
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from fewbits.quant_ops.calibration import (
    Calibration,
    InputStatistics,
    Observer,
    load_calibration,
    save_calibration,
)
from fewbits.quant_ops.calibration import observer as observing
from fewbits.quant_ops.calibration.observer import SPREAD_ON_GPU
from fewbits.quant_ops.calibration.statistics import CALLS_LOOKED_AT, ROWS_LOOKED_AT
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.checkpoint.verify import stored_findings
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.doors.quantize import plan_file
from fewbits.quant_ops.errors import CheckpointError, RecipeError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.layers import correlated_rows, heavy_weight

MEGABYTE = 10**6
SQUARE = (64, 64)


class Block(torch.nn.Module):
    """q and k are given the same tensor, out another one."""

    def __init__(self, width=64):
        super().__init__()
        for name in ("q", "k", "out"):
            setattr(self, name, torch.nn.Linear(width, width, bias=False))
        self.small = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.out(torch.relu(self.q(x)) + self.k(x)), self.small(x[..., :8])


def watched(observer, model, *inputs):
    for x in inputs:
        observer.start_run()
        with observer.watching(model):
            model(x)
    return observer.finish()


def close(found, wanted):
    """Equal but for the jitter on the diagonal, a millionth of the trace."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6 * float(wanted.trace()))


def rows(count, seed=0):
    return correlated_rows(64, count, seed)


def test_layers_with_the_same_input_share_their_statistics():
    found = watched(Observer(MEGABYTE), Block(), rows(32), rows(48, 1))
    assert list(found.layers) == ["q", "k", "out"]
    assert found.layers["q"] == found.layers["k"] != found.layers["out"]
    assert found.inputs[0].count == 80


def test_a_gram_is_exact_and_its_halves_are_runs():
    a, b, c = rows(32), rows(48, 1), rows(16, 2)
    found = watched(Observer(MEGABYTE), Block(), a, b, c)
    first, second = found.inputs_of("q", SQUARE).halves
    close(first.T @ first, a.T @ a / 32)
    close(second.T @ second, torch.cat([b, c]).T @ torch.cat([b, c]) / 64)
    statistics = found.inputs[0]
    together = torch.cat([a, b, c])
    torch.testing.assert_close(statistics.total, together.sum(0))
    torch.testing.assert_close(statistics.square, together.square().sum(0))
    assert torch.equal(statistics.largest, together.abs().amax(0))


def test_a_single_run_fills_both_halves_call_by_call():
    observer, model = Observer(MEGABYTE), Block()
    observer.start_run()
    for seed in range(4):
        with observer.watching(model):
            model(rows(16, seed))
    assert observer.finish().inputs_of("q", SQUARE).counts == (32, 32)


def test_what_comes_at_every_other_run_fills_both_halves():
    found = watched(
        Observer(MEGABYTE), Block(), *(rows(24 if run % 2 else 16, run) for run in range(8))
    )
    assert found.inputs_of("q", SQUARE).counts == (80, 80)


def test_memory_stays_within_the_bound_however_much_is_seen():
    memory = 60_000
    observer, model = Observer(memory), Block()
    for seed in range(200):
        watched(observer, model, rows(64, seed))
    kept = [half for statistics in observer.calibration.inputs for half in statistics.halves]
    assert sum(half.held * 64 * 2 for half in kept) <= memory
    assert min(half.held for half in kept) >= 32
    assert all(half.stride > 1 for half in kept)


def test_layers_that_share_an_input_count_once_against_the_memory():
    """q and k share one, which the first call does not know yet: three inputs, then two."""
    memory, found = 60_000, []
    observer, model = Observer(memory), Block()
    for seed in range(64):
        watched(observer, model, rows(64, seed))
        found.append({statistics.capacity for statistics in observer.calibration.inputs})
    assert found == [{memory // (2 * 2 * 3 * 64)}] + 63 * [{memory // (2 * 2 * 2 * 64)}]
    kept = [half for statistics in observer.calibration.inputs for half in statistics.halves]
    assert memory / 2 < sum(half.held * 64 * 2 for half in kept) <= memory


def test_what_began_with_rows_goes_on_with_rows():
    statistics = InputStatistics(64, 100)
    statistics.allow(1000)
    assert statistics.capacity == 127 and not statistics.exact
    statistics.allow(50)
    assert statistics.capacity == 127


def test_every_row_of_a_large_input_stands_for_its_neighbours():
    x = rows(4 * ROWS_LOOKED_AT)
    found = watched(Observer(MEGABYTE), Block(), x, x)
    statistics = found.inputs[0]
    assert statistics.count == 2 * len(x)
    looked = x[1::4].T @ x[1::4] / ROWS_LOOKED_AT
    first, second = found.inputs_of("q", SQUARE).halves
    close(first.T @ first, looked)
    torch.testing.assert_close(statistics.square, 8 * x[1::4].square().sum(0), rtol=1e-4, atol=0)


def test_late_calls_are_looked_at_seldom_and_stand_for_the_others():
    observer, model, looked = Observer(MEGABYTE), Block(), []
    observer.start_run()
    for call in range(8 * CALLS_LOOKED_AT):
        with observer.watching(model):
            model(rows(2, call))
        half = observer.calibration.inputs[0].halves[call % 2]
        looked.append(half.count)
    found = observer.finish().inputs[0]
    assert [half.stride for half in found.halves] == [8, 8]
    assert found.count == 2 * 8 * CALLS_LOOKED_AT
    quarter = 2 * CALLS_LOOKED_AT
    assert looked[:quarter:2] == list(range(2, quarter + 1, 2))
    assert len(set(looked[-quarter::2])) == CALLS_LOOKED_AT // 4 + 1


def stored_bytes(widths, memory):
    """Of a calibration that is full: every layer with an input of its own."""
    layers = {str(number): torch.nn.Linear(k, 64, device="meta") for number, k in enumerate(widths)}
    capacity = Observer(memory)._capacity(layers)
    found = Calibration()
    for number, k in enumerate(widths):
        statistics = InputStatistics(k, capacity, *torch.empty(3, k, device="meta"))
        for half in statistics.halves:
            if statistics.exact:
                half.gram = torch.empty(k, k, device="meta")
            else:
                half.rows = [torch.empty(capacity, k, dtype=torch.bfloat16, device="meta")]
        found.layers[str(number)] = (number, 64, k)
        found.inputs.append(statistics)
    return sum(tensor.nbytes for tensor in found.to_tensors()[0].values())


@pytest.mark.parametrize(
    "widths",
    [
        19 * (8 * [3072] + 2 * [12288]) + 38 * (2 * [3072] + [15360]),
        60 * (12 * [3072] + 2 * [12288]),
        40 * (9 * [5120] + [13824]),
    ],
    ids=["Flux.1", "Qwen-Image", "Wan 14B"],
)
@pytest.mark.parametrize("gigabytes", [1, 2])
def test_the_file_of_a_large_model_is_as_large_as_asked_for(widths, gigabytes):
    size = stored_bytes(widths, gigabytes * 10**9)
    assert 0.97 < size / (gigabytes * 10**9) < 1.04


def test_nothing_changes_and_no_hook_is_left():
    model, x = Block(), rows(32)
    expected = model(x)
    state = torch.get_rng_state()
    found = Observer(MEGABYTE)
    with found.watching(model):
        seen = model(x)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="stop"), found.watching(model):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in model.modules())


class Ops(TorchDispatchMode):
    """Counts operations, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", [10 * MEGABYTE, 100_000], ids=["grams", "rows"])
def test_a_gpu_gets_few_operations_of_a_watched_run_and_is_never_waited_for(monkeypatch, memory):
    """Forty layers on a device that is not "cpu" to the observer. Before: 25 operations for each
    input in each evaluation, some of which waited.
    """
    monkeypatch.setattr(observing, "SPREAD", {})
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(40)))
    observer, x = Observer(memory), rows(256)
    model(x)
    evaluations = 1 + 2 * SPREAD_ON_GPU
    with Ops() as plain, torch.no_grad():
        for _ in range(evaluations):
            model(x)
    observer.start_run()
    with Ops() as seen, torch.no_grad():
        for _ in range(evaluations):
            with observer.watching(model):
                model(x)
    added = seen.counts - plain.counts
    looks = 3 * 40  # in the first evaluation, and then once in each thirteen
    assert sum(added.values()) <= 11 * looks  # views most of them; three launch something
    assert not {name for name in added if "local_scalar" in name or "_to_copy" in name}
    counts = {statistics.count for statistics in observer.finish().inputs}
    assert counts == {3 * 256}


def test_a_calibration_keeps_no_model_alive():
    model = Block()
    observer = Observer(MEGABYTE)
    watched(observer, model, rows(32))
    alive = weakref.ref(model.q)
    del model
    gc.collect()
    assert alive() is None and observer.calibration.rows == 32


def test_damaged_rows_are_left_out():
    x = rows(32)
    x[3, 5] = torch.nan
    x[4, 6] = torch.inf
    found = watched(Observer(MEGABYTE), Block(), x)
    assert found.inputs[0].count == 30 and found.inputs[0].damaged == 2
    assert found.missing("q", (64, 64)) is None


@pytest.mark.parametrize("memory", [MEGABYTE, 20_000], ids=["grams", "rows"])
def test_a_file_gives_back_what_was_collected(tmp_path, memory):
    found = watched(Observer(memory), Block(), *(rows(40, seed) for seed in range(6)))
    save_calibration(found, tmp_path / "c.safetensors")
    loaded = load_calibration(tmp_path / "c.safetensors")
    assert loaded.layers == found.layers
    for name in found.layers:
        ours, theirs = found.inputs_of(name, SQUARE), loaded.inputs_of(name, SQUARE)
        assert ours.counts == theirs.counts
        assert all(torch.equal(a, b) for a, b in zip(ours.halves, theirs.halves, strict=True))


def test_a_text_encoders_layers_are_found_under_the_names_in_its_file():
    """ComfyUI puts `clip_l.transformer.` before them, a checkpoint `cond_stage_model.`."""
    found = watched(Observer(MEGABYTE), Block(), rows(40))
    entry = found.layers["q"]
    found.layers = {"clip_l.transformer.enc.q": entry, "clip_g.transformer.enc.q": (*entry[:2], 32)}
    for name in ("enc.q", "clip_l.transformer.enc.q", "cond_stage_model.transformer.enc.q"):
        assert found.missing(name, SQUARE) is None
    assert "in the calibration 64x32" in found.missing("clip_g.transformer.enc.q", SQUARE)
    found.layers["t5.transformer.enc.q"] = entry
    assert found.missing("enc.q", SQUARE) == "not in the calibration"


def test_two_calibrations_of_a_model_become_one():
    first, second = (watched(Observer(MEGABYTE), Block(), rows(40, seed)) for seed in (0, 1))
    first.merge(second)
    assert first.inputs[0].count == 80
    close(first.inputs_of("q", SQUARE).gram * 80, sum(rows(40, s).T @ rows(40, s) for s in (0, 1)))
    with pytest.raises(CheckpointError, match="different models"):
        first.merge(watched(Observer(MEGABYTE), Block(32), correlated_rows(32, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, facts: facts.update(version=2), "version 2"),
        (lambda tensors, facts: facts.update(layers={"q": [9, 64, 64]}), "damaged"),
        (lambda tensors, facts: facts.update(layers={"q": [0, 64, 32]}), "layer .* and inputs differ"),
        (lambda tensors, facts: facts.update(inputs=[{}]), "damaged"),
        (lambda tensors, facts: facts.pop("layers"), "damaged"),
        (lambda tensors, facts: facts.update(layers={"q": [0.0, 64, 64]}), "0.0 is no count"),
        (lambda tensors, facts: facts["inputs"][0].update(counts=[1e400, 3]), "Infinity is no number"),
        (lambda tensors, facts: facts["inputs"][0].update(counts=[10**400, 3]), "is no count"),
        (lambda tensors, facts: facts["inputs"][0].update(capacity=-1), "-1 is no count"),
        (lambda tensors, facts: tensors.pop("input.0.square"), "'input.0.square' is missing"),
        (lambda tensors, facts: tensors.pop("input.0.0.gram"), "'input.0.0.gram' is missing"),
        (lambda tensors, facts: tensors.update({"input.0.total": torch.ones(3)}), "does not fit K=64"),
        (lambda tensors, facts: tensors.update({"input.0.0.gram": torch.ones(3, 64)}), "does not fit K=64"),
    ],
    ids=["version", "input", "width", "facts", "layers", "fraction", "infinite", "long", "negative", "no square", "no gram",
         "moments", "gram"],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "c.safetensors"
    found = watched(Observer(MEGABYTE), Block(), rows(40))
    tensors, metadata = found.to_tensors()
    facts = json.loads(metadata["fewbits.calibration"])
    change(tensors, facts)
    save_file(tensors, path, metadata={"fewbits.calibration": json.dumps(facts)})
    with pytest.raises(CheckpointError, match=message):
        load_calibration(path)


def test_json_that_is_nested_deeply_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({}, path, metadata={"fewbits.calibration": "[" * 100_000})
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_calibration(path)


def test_sums_that_no_rows_lead_to_are_refused_by_layer():
    found = watched(Observer(MEGABYTE), Block(), rows(40))
    found.inputs[0].halves[0].gram.neg_()
    with pytest.raises(CheckpointError, match="layer 'q': its statistics .* no squares"):
        found.inputs_of("q", SQUARE)


def test_a_calibration_is_an_input_and_never_the_output(tmp_path):
    path = tmp_path / "c.safetensors"
    save_calibration(watched(Observer(MEGABYTE), Block(), rows(40)), path)
    before = path.read_bytes()
    save_file({"q.weight": torch.ones(64, 64)}, tmp_path / "m.safetensors")
    recipe = Recipe(parse_wish("int8_tensorwise"), preset="none")
    with pytest.raises(CheckpointError, match="would replace .*c.safetensors, which is read from"):
        quantize_file(
            tmp_path / "m.safetensors",
            path,
            recipe,
            overwrite=True,
            calibration=load_calibration(path),
        )
    assert path.read_bytes() == before


def test_a_model_file_is_no_calibration(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="not a calibration"):
        load_calibration(tmp_path / "m.safetensors")


@pytest.fixture
def model_path(tmp_path):
    weights = {f"{name}.weight": heavy_weight(64, 64, seed) for seed, name in enumerate("qkv")}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


GPTQ = Recipe(parse_wish("bnb_nf4:method=gptq"), preset="none")


def test_layers_that_were_not_seen_are_rounded_without_and_the_plan_says_so(tmp_path, model_path):
    x = rows(2048)
    found = watched(Observer(MEGABYTE), Block(), x[:1024], x[1024:])
    report = quantize_file(model_path, tmp_path / "out.safetensors", GPTQ, calibration=found)
    methods = {layer.name: (layer.method, layer.reason) for layer in report.plan.layers}
    assert methods["q"][0] == methods["k"][0] == "gptq"
    assert methods["v"][0] == "nearest"
    assert "nearest instead of gptq: not in the calibration" in methods["v"][1]
    gains = {result.name: result.against_nearest for result in report.results}
    assert gains["q"]["objective"] < 0.8 and gains["v"] is None


@pytest.mark.parametrize(("format", "full"), [("float8_e4m3fn", 448), ("nvfp4", 2688)])
def test_input_scales_are_stored_for_layers_that_were_seen(tmp_path, model_path, format, full):
    x = rows(256)
    found = watched(Observer(MEGABYTE), Block(), x)
    recipe, target = Recipe(parse_wish(format), preset="none"), tmp_path / "out.safetensors"
    report = quantize_file(
        model_path, target, recipe, calibration=found, input_scales=True, verify=True
    )
    stored = load_file(target)
    assert {name for name in stored if name.endswith("input_scale")} == {
        "q.input_scale",
        "k.input_scale",
    }
    assert stored["q.input_scale"].shape == ()
    assert float(stored["q.input_scale"]) == pytest.approx(2 * float(x.abs().max()) / full)
    assert report.plan.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    planned = plan_file(model_path, recipe, calibration=found, input_scales=True)
    assert planned.bytes_after == report.plan.bytes_after
    with FileSource(target) as source:
        assert stored_findings(source) == []


@pytest.mark.parametrize(
    ("wish", "seen", "message"),
    [
        ("float8_e4m3fn", False, "input scales need a calibration"),
        ("int8_tensorwise", True, "no layer takes an input scale"),
        ("float8_e4m3fn:full_precision_matrix_mult=true", True, "no layer takes an input scale"),
    ],
    ids=["no calibration", "scaled while running", "full precision"],
)
def test_input_scales_that_nothing_would_use_are_refused(tmp_path, model_path, wish, seen, message):
    found = watched(Observer(MEGABYTE), Block(), rows(256)) if seen else None
    recipe, target = Recipe(parse_wish(wish), preset="none"), tmp_path / "out.safetensors"
    with pytest.raises(RecipeError, match=message):
        quantize_file(model_path, target, recipe, calibration=found, input_scales=True)
    assert not target.exists()


def test_without_a_calibration_or_with_another_models_nothing_is_written(tmp_path, model_path):
    target = tmp_path / "out.safetensors"
    with pytest.raises(RecipeError, match="needs a calibration"):
        quantize_file(model_path, target, GPTQ)
    other = watched(Observer(MEGABYTE), Block(32), correlated_rows(32, 64))
    with pytest.raises(
        CheckpointError, match=r"layer '[qk]' is \[64, 64\], in the calibration \[32, 32\]"
    ):
        quantize_file(model_path, target, GPTQ, calibration=other)
    with pytest.raises(CheckpointError, match="knows none of the 3 layers"):
        quantize_file(model_path, target, GPTQ, calibration=Calibration())
    assert not target.exists()


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (InputStatistics(64, 1000), "nothing was seen"),
        (InputStatistics(64, 1000, *torch.zeros(3, 64), halves=watched(Observer(MEGABYTE), Block(), rows(8)).inputs[0].halves), "zero all the time"),
        (InputStatistics(64, 1000, *torch.full((3, 64), torch.nan), halves=watched(Observer(MEGABYTE), Block(), rows(8)).inputs[0].halves), "NaN or infinite"),
    ],
    ids=["nothing", "zeros", "nan"],
)  # fmt: skip
def test_statistics_that_teach_nothing_are_ignored_with_a_reason(statistics, message):
    calibration = Calibration({"q": (0, 64, 64)}, [statistics])
    assert message in calibration.missing("q", (64, 64))


def test_equal_files_come_from_equal_runs(tmp_path):
    model = Block()
    for name in ("a", "b"):
        observer = Observer(20_000, seed=5)
        for seed in range(6):
            watched(observer, model, rows(64, seed))
        save_calibration(observer.finish(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "input.0.0.rows" in load_file(tmp_path / "a")
