"""Settings that ComfyUI keeps as modules without weights beside layers: which attention a block prefers, for example."""

import pytest
import torch

PLACE = "double_blocks.0.img_attn.preference"
KEY = f"diffusion_model.{PLACE}"


class Preference(torch.nn.Module):
    """Says something of a block in its state dict, as JSON, and has no weights."""

    def __init__(self, text=None):
        super().__init__()
        self.text = text

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.text is not None:
            destination[f"{prefix}config"] = encoded(self.text)


def encoded(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@pytest.fixture
def preferring(model):
    """A MODEL whose block prefers something, and its file says so."""
    model.model.diffusion_model.double_blocks[0].img_attn.preference = Preference("int8")
    model.cached_patcher_init = None
    return model


def saved_preference(save, model, tmp_path):
    from safetensors.torch import load_file

    save(model, tmp_path / "saved.safetensors")
    found = load_file(tmp_path / "saved.safetensors").get(f"{PLACE}.config")
    return None if found is None else bytes(found.tolist()).decode()


@pytest.mark.parametrize("patched", ["sol", None])
def test_a_patched_preference_is_what_is_saved(preferring, save, tmp_path, patched):
    assert saved_preference(save, preferring, tmp_path) == "int8"
    other = preferring.clone()
    other.add_object_patch(KEY, Preference(patched))
    (tmp_path / "saved.safetensors").unlink()
    assert saved_preference(save, other, tmp_path) == patched


def test_a_patched_preference_survives_quantizing(model, quantize):
    model.model.diffusion_model.double_blocks[0].img_attn.preference = Preference()
    patch = Preference("sol")
    model.add_object_patch(KEY, patch)
    quantized, report = quantize(model, "int8_tensorwise")
    assert quantized.object_patches[KEY] is patch
    assert f"{PLACE}.config" not in {layer.name for layer in report.plan.layers if layer.format}


def test_a_module_without_weights_in_place_of_a_layer_is_refused(model, quantize):
    """It may hold the layer's weights where nobody sees them."""
    from fewbits.quant_ops.errors import UnsupportedLayerError

    model.add_object_patch("diffusion_model.double_blocks.0.img_attn.proj", Preference())
    with pytest.raises(UnsupportedLayerError, match="double_blocks.0.img_attn.proj' was replaced"):
        quantize(model, "int8_tensorwise")
