"""Merging with a quantized model: the merge is that of the decoded weights, on either side."""

import pytest
import torch

NAME = "diffusion_model.single_blocks.0.linear1.weight"
WISHES = pytest.mark.parametrize(
    "wish", ["int8_tensorwise", "float8_e4m3fn", "bnb_nf4", "int8_blockwise"]
)


@pytest.fixture
def other(comfy, model_file, tmp_path):
    """A second model of the same shapes."""
    from safetensors.torch import load_file, save_file

    tensors = {
        name: tensor.flip(0) if tensor.dim() == 2 else tensor
        for name, tensor in load_file(model_file).items()
    }
    save_file(tensors, tmp_path / "other.safetensors")
    return comfy.sd.load_diffusion_model(str(tmp_path / "other.safetensors"))


def patched(model, key):
    return model.patch_weight_to_device(key, torch.device("cpu"), return_weight=True).float()


def decoded(model, key):
    from comfy.utils import get_attr
    from comfy_kitchen.tensor import QuantizedTensor

    weight = get_attr(model.model, key)
    return (weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).float()


@pytest.fixture
def merge(comfy):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return lambda one, two, ratio=0.25: ModelMergeSimple().merge(one, two, ratio)[0]


@WISHES
def test_a_quantized_second_model_is_merged_by_its_decoded_weights(
    model, other, merge, quantize, wish
):
    second, _ = quantize(other, wish)
    merged = merge(model, second)
    assert set(merged.patches) == {
        f"diffusion_model.{name}" for name in model.model.diffusion_model.state_dict()
    }
    wanted = 0.25 * decoded(model, NAME) + 0.75 * decoded(second, NAME)
    torch.testing.assert_close(patched(merged, NAME), wanted, rtol=1e-5, atol=1e-6)


@WISHES
def test_a_quantized_first_model_takes_the_merge_into_its_codes(
    model, other, merge, quantize, wish, sample
):
    first, _ = quantize(model, wish)
    before = sample(first)
    merged = merge(first, other)
    wanted = 0.25 * decoded(first, NAME) + 0.75 * decoded(other, NAME)
    got = (
        merged.patch_weight_to_device(NAME, torch.device("cpu"), return_weight=True)
        .dequantize()
        .float()
    )
    error = float((got - wanted).norm() / wanted.norm())
    assert 0 < error < (0.15 if wish == "bnb_nf4" else 0.05)
    assert not torch.equal(sample(merged), before)
    assert torch.equal(sample(first), before)


def test_two_quantized_models_merge_and_the_result_can_be_quantized(model, other, merge, quantize):
    from fewbits.quant_ops.errors import QuantError

    first, second = quantize(model, "int8_tensorwise")[0], quantize(other, "bnb_nf4")[0]
    with pytest.raises(QuantError, match="quantized already"):
        quantize(merge(first, second))
    report = quantize(merge(model, second))[1]
    assert {row["format"] for row in report.to_json()["layers"]} == {"int8_tensorwise", None}


def test_a_lora_on_the_second_model_is_merged_too(model, other, merge, quantize):
    second, _ = quantize(other, "int8_tensorwise")
    delta = (
        torch.randn(*decoded(second, NAME).shape, generator=torch.Generator().manual_seed(4)) * 0.01
    )
    second.add_patches({NAME: ("diff", (delta,))})
    wanted = 0.25 * decoded(model, NAME) + 0.75 * (decoded(second, NAME) + delta)
    torch.testing.assert_close(patched(merge(model, second), NAME), wanted, rtol=1e-5, atol=1e-6)


def test_plain_models_go_through_comfyuis_own_function_alone(model, other, merge, monkeypatch):
    kinds = []
    listed = type(other).model_state_dict
    monkeypatch.setattr(
        type(other),
        "model_state_dict",
        lambda self, *a: kinds.append(type(self)) or listed(self, *a),
    )
    merge(model, other)
    assert len(kinds) == 1 and "model_state_dict" not in vars(other)


def test_without_the_seam_comfyui_fails_at_the_first_scale(
    model, other, merge, quantize, monkeypatch
):
    """The day this stops failing, the seam can go."""
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(ModelPatcher, "get_key_patches", ModelPatcher.get_key_patches.__wrapped__)
    with pytest.raises(AttributeError):
        merge(model, quantize(other)[0])
