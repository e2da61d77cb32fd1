"""Calibrate in the graph: pictures stay as they are, and what was seen rounds the model."""

import pytest
import torch
from safetensors.torch import save_file

from support.helpers import EMOJI, clip_shapes, random_tensors


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


def test_effects_are_measured_of_every_layer_and_change_no_bit(model, sample):
    from fewbits.nodes.bridge.observe import observed
    from fewbits.quant_ops.calibration import Observer

    expected = sample(model)
    observer = Observer(10**9, effects=1)
    watched = observed(model, observer)
    for _ in range(2):  # the second has nothing left to measure
        assert torch.equal(sample(watched), expected)
    found = observer.finish()
    assert observer.effects.taken == 1
    assert set(found.effects) == set(found.layers)
    assert {count for _, count in found.effects.values()} == {1}
    assert not any(m._forward_hooks for m in model.model.diffusion_model.modules())


def test_the_prompts_part_of_a_batch_is_found_and_controls_are_not_used_up(comfy):
    from fewbits.nodes.bridge.observe import _prompted, _with_own_control

    x = torch.zeros(4, 3)
    options = {"transformer_options": {"cond_or_uncond": [1, 0]}}
    assert _prompted(x, x, options) == slice(2, 4)
    assert _prompted(x, x, {}) == slice(0, 4)
    assert _prompted(x, x, {"transformer_options": {"cond_or_uncond": [1]}}) is None
    assert _prompted(x, (x, x), options) is None
    given = {"control": {"input": [1, 2], "all": None}, "y": 3}
    own = _with_own_control(given)
    own["control"]["input"].pop()
    assert given["control"]["input"] == [1, 2] and own["y"] == 3


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


@pytest.mark.slow
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


@pytest.fixture
def emoji_with_lora(comfy):
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(EMOJI.with_name("emoji_lora_blue.safetensors")))
    model = comfy.sd.load_diffusion_model(str(EMOJI))
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]


@pytest.mark.slow
def test_a_batch_of_a_model_with_a_lora_is_watched(emoji_with_lora, sample, calibrate):
    expected = sample(emoji_with_lora, 256, batch=2)
    watched, observer = calibrate(emoji_with_lora)
    assert torch.equal(sample(watched, 256, batch=2), expected)
    assert observer.finish().rows == 2 * 2 * (16 + 8)  # steps, pictures, their tokens and words


@pytest.mark.slow
def test_a_model_whose_layers_come_when_they_are_used_is_watched(emoji_with_lora, calibrate):
    """What --lowvram does on a GPU: weights and LoRA are brought per use."""
    patcher, cpu = emoji_with_lora, torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    x, context, y = (
        torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (1, 8, 256), (1, 256))
    )
    _, observer = calibrate(patcher)
    patcher.patch_model(cpu, lowvram_model_memory=1)
    try:
        model = patcher.model.diffusion_model
        assert any(getattr(module, "weight_function", ()) for module in model.modules())
        expected = model(x, torch.ones(1), context, y)
        with observer.watching(model):
            assert torch.equal(model(x, torch.ones(1), context, y), expected)
    finally:
        patcher.unpatch_model(cpu)
    assert observer.finish().rows == 16 + 8
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.fixture
def clip(comfy, small_clip, tmp_path):
    path = tmp_path / "clip_small.safetensors"
    save_file(random_tensors(clip_shapes(2, 128)), path)
    return comfy.sd.load_clip([str(path)])


@pytest.fixture
def watch_clip(comfy):
    from fewbits.nodes.bridge.observe import observed_clip
    from fewbits.quant_ops.calibration import Observer

    def run(clip):
        observer = Observer(10**9)
        return observed_clip(clip, observer), observer

    return run


def test_a_watched_text_encoder_gives_the_same_bits_and_keeps_no_hook(clip, encode, watch_clip):
    expected = encode(clip)
    watched, observer = watch_clip(clip)
    assert torch.equal(encode(watched), expected)
    assert torch.equal(encode(clip), expected)
    assert observer.run == 0 and observer.finish().rows == 77
    assert not any(m._forward_pre_hooks for m in clip.cond_stage_model.modules())


def test_a_clone_of_a_watched_text_encoder_is_watched_and_scheduled_texts_count_once(
    clip, watch_clip
):
    watched, observer = watch_clip(clip)
    clone = watched.clone()
    clone.clip_layer(-2)
    clone.encode_from_tokens_scheduled(clone.tokenize("a red panda"))
    clone.encode_from_tokens_scheduled(clone.tokenize("a blue whale"))
    assert observer.run == 1
    assert observer.finish().inputs[0].halves[0].count == 77


@pytest.mark.slow
def test_text_encoders_are_rounded_with_what_was_seen(clip, encode, watch_clip, quantize_clip):
    watched, observer = watch_clip(clip)
    texts = ["a red panda on a bicycle", "two blue whales", "an old town at night", "a green tea"]
    for text in texts:
        encode(watched, text)
    calibrated, report = quantize_clip(clip, "bnb_nf4:method=gptq", calibration=observer.finish())
    nearest, _ = quantize_clip(clip, "bnb_nf4")
    assert {result.against_nearest["stored"] for result in report.results} == {"gptq"}

    def error(of):
        return sum(float((encode(of, text) - encode(clip, text)).norm()) for text in texts)

    assert error(calibrated) < error(nearest)
