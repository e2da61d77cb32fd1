"""A LoRA beside the product of a quantized layer: exact, without loading time, and gone with it."""

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from support.helpers import EMOJI

LORA = EMOJI.with_name("emoji_lora_blue.safetensors")
WISHES = pytest.mark.parametrize(
    "wish", ["int8_tensorwise", "float8_e4m3fn", "bnb_nf4", "nvfp4", "asym_w4a8_int8"]
)
CPU = torch.device("cpu")
LAYER = "diffusion_model.double_blocks.0.img_mlp.0"


@pytest.fixture
def model(comfy, quantize):
    return lambda wish: quantize(comfy.sd.load_diffusion_model(str(EMOJI)), wish)[0]


@pytest.fixture
def lora(comfy):
    import comfy.utils

    return comfy.utils.load_torch_file(str(LORA))


@pytest.fixture
def patched(comfy, lora):
    def run(model, *strengths):
        for strength in strengths:
            model, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)
        return model

    return run


def layer_of(patcher):
    return patcher.model.get_submodule(LAYER)


def beside(patcher):
    layers = patcher.model.modules()
    return [layer for layer in layers if getattr(layer, "_fewbits_low_rank", None) is not None]


def same(codes, others):
    return torch.equal(codes.view(torch.uint8), others.view(torch.uint8))


def adapter(up, down, alpha=None, middle=None):
    from comfy.weight_adapter.lora import LoRAAdapter

    return LoRAAdapter(set(), (up, down, alpha, middle, None, None))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.mark.slow
@WISHES
@pytest.mark.parametrize("memory", [0, 1], ids=["loaded", "low VRAM"])
def test_a_layer_gives_its_own_output_and_the_loras_to_the_bit_of_its_dtype(
    model, patched, wish, memory
):
    plain = model(wish)
    layer, x = layer_of(plain), random(3, 5, 256)
    both = patched(plain, 0.75, -0.25)
    plain.patch_model(CPU)
    codes, before = layer.weight, layer(x)
    plain.unpatch_model(CPU)
    both.patch_model(CPU, lowvram_model_memory=memory)
    try:
        assert layer in beside(both) and layer.weight_function == []
        assert same(layer.weight._qdata, codes._qdata)  # nothing was rounded again
        strength, lora, *_ = both.patches[f"{LAYER}.weight"][0]
        up, down, alpha = (lora.weights[part] for part in range(3))
        scale = 0.5 * (1.0 if alpha is None else alpha / len(down))
        delta = scale * (x @ down.float().t()) @ up.float().t()
        assert delta.norm() > 0.01 * before.norm()
        error = (layer(x) - before - delta).norm() / before.norm()
        assert error < 1e-3
    finally:
        both.unpatch_model(CPU)
    assert beside(both) == [] and torch.equal(layer(x), before)


@pytest.mark.slow
@WISHES
def test_strength_zero_and_a_lora_that_was_taken_off_leave_every_bit(model, patched, sample, wish):
    plain = model(wish)
    before = sample(plain, 256)
    assert torch.equal(sample(patched(plain, 0.0), 256), before)
    assert not torch.equal(sample(patched(plain, 1.0), 256), before)
    assert torch.equal(sample(plain, 256), before)


def test_several_loras_are_two_products_and_another_strength_rounds_nothing(model, patched):
    plain = model("bnb_nf4")
    codes = layer_of(plain).weight._qdata
    for strengths in [(1.0,), (0.5, 0.5), (1.0, -0.6, 0.3)]:
        both = patched(plain, *strengths)
        both.patch_model(CPU)
        rank = both.patches[f"{LAYER}.weight"][0][1].weights[1].shape[0]
        assert layer_of(both)._fewbits_low_rank.down.shape == (len(strengths) * rank, 256)
        assert same(layer_of(both).weight._qdata, codes)
        both.unpatch_model(CPU)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_lora_of_a_part_of_a_weight_changes_that_part(model, axis):
    patcher = model("int8_tensorwise").clone()
    key, x = f"{LAYER}.weight", random(4, 256)
    n = layer_of(patcher).weight.shape[0]
    up, down = (
        (random(64, 3, seed=1), random(3, 256)) if axis == 0 else (random(n, 3), random(3, 64))
    )
    patcher.add_patches({(key, (axis, 64, 64)): adapter(up, down, alpha=6.0)}, 0.5)
    wanted = torch.zeros(n, 256)
    part = wanted[64:128] if axis == 0 else wanted[:, 64:128]
    part += 0.5 * 2.0 * up @ down
    layer = layer_of(patcher)
    before = layer(x)
    patcher.patch_model(CPU)
    assert layer in beside(patcher)
    torch.testing.assert_close(layer(x) - before, x @ wanted.t(), rtol=1e-3, atol=1e-4)
    patcher.unpatch_model(CPU)


OTHERS = {
    "a difference": lambda n: ("diff", (random(n, 256),)),
    "a middle matrix": lambda n: adapter(random(n, 3), random(3, 256), middle=random(3, 3, 1, 1)),
    "a wrong shape": lambda n: adapter(random(n, 3), random(3, 128)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_two_matrices_of_the_weights_shape_goes_comfyuis_way(model, patched, other):
    from fewbits.nodes.bridge.seams import low_rank

    patcher = patched(model("int8_tensorwise"), 1.0)
    patch = OTHERS[other](len(layer_of(patcher).weight))
    patcher.add_patches({f"{LAYER}.weight": patch})
    keys = low_rank._beside(patcher)
    assert f"{LAYER}.weight" not in keys and keys  # the other layers' LoRAs do


def test_a_wrapped_weight_and_the_setting_go_comfyuis_way(model, patched, monkeypatch):
    from fewbits.nodes.bridge.seams import low_rank

    patcher = patched(model("int8_tensorwise"), 1.0)
    patcher.add_weight_wrapper(f"{LAYER}.weight", lambda weight: weight)
    assert f"{LAYER}.weight" not in low_rank._beside(patcher)
    monkeypatch.setenv(low_rank.SETTING, "bake")
    patcher.patch_model(CPU)
    assert beside(patcher) == []
    patcher.unpatch_model(CPU)


def test_layers_moved_out_and_in_again_apply_it_once(model, patched, comfy):
    patcher, x = patched(model("int8_blockwise"), 1.0), random(4, 256)
    layer = layer_of(patcher)
    patcher.patch_model(CPU, lowvram_model_memory=1 << 40)
    wanted = layer(x)
    assert patcher.partially_unload(CPU, 1 << 40) > 0
    assert layer in beside(patcher) and layer.weight_function == []
    assert torch.equal(layer(x), wanted)
    patcher.partially_load(CPU, 1 << 40)
    assert torch.equal(layer(x), wanted) and isinstance(layer.weight, QuantizedTensor)
    patcher.unpatch_model(CPU)


@pytest.mark.slow
@WISHES
def test_a_saved_model_holds_its_lora(model, patched, wish, monkeypatch):
    """ComfyUI saves the weights of loaded layers as they are."""
    patcher = patched(model(wish), 1.0)
    patcher.patch_model(CPU)
    assert beside(patcher)
    saved = patcher.model_state_dict_for_saving(patcher.model.diffusion_model, "diffusion_model.")
    saved = {name: tensor.clone() for name, tensor in saved.items()}
    patcher.unpatch_model(CPU)
    monkeypatch.setenv("FEWBITS_LORA", "bake")
    patcher.patch_model(CPU)
    assert not beside(patcher)
    wanted = patcher.model.diffusion_model.state_dict()
    assert set(wanted) == set(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in wanted.items())
    patcher.unpatch_model(CPU)


ACTIVATIONS = {
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "swiglu": lambda x: torch.nn.functional.silu(x[..., :256]) * x[..., 256:],
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wish", ["int8_tensorwise", "int8_tensorwise:convrot=true", "bnb_nf4"])
def test_a_layer_that_comfyui_multiplies_by_without_calling_it_has_its_lora(
    model, patched, comfy, wish, activation
):
    fused = comfy.ops.linear_input_act
    both = patched(model(wish), 1.0)
    layer = layer_of(both)
    x = random(3, 5, 512 if activation == "swiglu" else 256)
    before = fused(layer, x, activation)
    both.patch_model(CPU)
    got, wanted = fused(layer, x, activation), layer(ACTIVATIONS[activation](x))
    both.unpatch_model(CPU)
    assert torch.equal(got, wanted)
    assert (got - before).norm() > 0.01 * before.norm()


def test_and_does_not_round_the_input_of_a_layer_that_asks_for_full_precision(model, comfy):
    layer = layer_of(model("int8_tensorwise:full_precision_matrix_mult=true"))
    x = random(3, 5, 256)
    got = comfy.ops.linear_input_act(layer, x, "gelu_tanh")
    assert torch.equal(got, layer(ACTIVATIONS["gelu_tanh"](x)))


def test_gradients_pass_through_it(model, patched):
    patcher = patched(model("bnb_nf4"), 1.0)
    patcher.patch_model(CPU)
    with torch.inference_mode(False), torch.enable_grad():
        x = random(4, 256).clone().requires_grad_()
        layer = layer_of(patcher)
        low = layer._fewbits_low_rank
        low.down, low.up = low.down.clone(), low.up.clone()  # were made in inference mode
        layer(x).sum().backward()
        exact = layer.weight.dequantize().float() + low.up @ low.down
        torch.testing.assert_close(x.grad[0], exact.sum(0), rtol=1e-2, atol=1e-2)
    patcher.unpatch_model(CPU)
