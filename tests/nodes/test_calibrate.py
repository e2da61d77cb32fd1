"""Calibrate in the graph: pictures stay as they are, and what was seen rounds the model."""

import pytest
import torch


@pytest.fixture
def calibrate(comfy):
    from fewbits.nodes.bridge.observe import observed
    from fewbits.quant_ops.calibration import Observer

    def run(model, memory=10**9):
        observer = Observer(memory)
        return observed(model, observer), observer

    return run


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_watched_model_gives_the_same_bits_and_keeps_no_hook(model, sample, calibrate):
    expected = sample(model)
    watched, observer = calibrate(model)
    assert torch.equal(sample(watched), expected)
    assert torch.equal(sample(model), expected)
    found = observer.finish()
    linears = [
        name
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear) and min(module.weight.shape) >= 16
    ]
    assert set(found.layers) == set(linears)
    assert not any(m._forward_pre_hooks for m in model.model.diffusion_model.modules())


def test_a_cancelled_run_keeps_what_was_seen(model, sample, calibrate, monkeypatch):
    watched, observer = calibrate(model)
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    watched.add_wrapper_with_key(
        "apply_model", "stop", lambda run, *a, **k: (stop(), run(*a, **k))[1]
    )
    with pytest.raises(InterruptedError):
        sample(watched)
    assert observer.finish().rows > 0
    assert not any(m._forward_pre_hooks for m in model.model.diffusion_model.modules())


def test_the_graph_rounds_with_what_was_seen(comfy, model, sample, calibrate):
    from fewbits.nodes.bridge.model_io import quantize_model
    from fewbits.quant_ops.pipeline import ignore_progress
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    watched, observer = calibrate(model)
    sample(watched)
    _, report = quantize_model(
        model,
        Recipe(parse_wish("int8_tensorwise:method=gptq")),
        device="cpu",
        calibration=observer.finish(),
        on_plan=lambda plan: None,
        on_progress=ignore_progress,
    )
    compared = [result.against_nearest for result in report.results]
    assert compared and all(row["objective"] <= 1 for row in compared)
    assert {row["stored"] for row in compared} == {"gptq"}


def test_a_quantized_model_can_be_watched(model, sample, calibrate, quantize):
    small, _ = quantize(model, "bnb_nf4")
    watched, observer = calibrate(small)
    assert torch.equal(sample(watched), sample(small))
    assert observer.finish().rows > 0
