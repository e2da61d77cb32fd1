"""ControlNet files: plain ones open as ever, quantized ones are refused by name; a Control-LoRA takes decoded weights."""

import pytest
import torch
from safetensors.torch import save_file

from support import dialects
from support.helpers import random_tensors


def file_with(tmp_path, tensors):
    path = tmp_path / "control.safetensors"
    save_file(tensors, path)
    return str(path)


CASES = {
    "ours": lambda: dialects.under(
        "controlnet_blocks.0", *dialects.native("int8_blockwise", torch.randn(256, 256))
    ),
    "ComfyUI's": lambda: dialects.under(
        "controlnet_blocks.0", *dialects.native("float8_e4m3fn", torch.randn(64, 64))
    ),
    "bitsandbytes": lambda: dialects.bitsandbytes("controlnet_blocks.0", torch.randn(64, 64)),
    "scaled_fp8": lambda: dialects.scaled_fp8("controlnet_blocks.0", torch.randn(64, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_controlnet_is_refused_with_layer_and_reason(comfy, tmp_path, case):
    import comfy.controlnet

    from fewbits.quant_ops.errors import UnsupportedLayerError

    path = file_with(tmp_path, {"controlnet_x_embedder.bias": torch.zeros(4), **CASES[case]()})
    with pytest.raises(
        UnsupportedLayerError,
        match=r"'controlnet_blocks.0' of this ControlNet is quantized.*original",
    ):
        comfy.controlnet.load_controlnet(path)


def test_a_plain_controlnet_file_reaches_comfyuis_own_loader(comfy, tmp_path):
    """A T2I adapter, the smallest kind that ComfyUI loads through the same function."""
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter_light

    adapter = Adapter_light(cin=64, channels=[320, 640, 1280, 1280], nums_rb=4)
    path = file_with(
        tmp_path, {name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}
    )
    assert isinstance(comfy.controlnet.load_controlnet(path), comfy.controlnet.T2IAdapter)


UNET = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
        "model_channels": 320, "num_res_blocks": [1, 1], "channel_mult": [1, 1], "num_heads": 8,
        "transformer_depth": [1, 0], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 0, 0],
        "context_dim": 768}  # fmt: skip


@pytest.fixture
def unet(comfy, tmp_path):
    """A small UNet with random weights, as a MODEL."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        made = UNetModel(**UNET, device="meta", operations=comfy.ops.disable_weight_init)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    path = file_with(tmp_path, random_tensors(shapes))
    return comfy.sd.load_diffusion_model(path)


@pytest.fixture
def control(comfy):
    """A Control-LoRA that changes one bias, and ComfyUI's preparation of it for a MODEL."""
    import comfy.controlnet

    def prepare(model):
        weights = {
            "input_hint_block.0.weight": torch.zeros(16, 3, 3, 3),
            "lora_controlnet": torch.zeros(0),
        }
        made = comfy.controlnet.ControlLora(weights)
        made.pre_run(model.model, lambda percent: percent)
        return made.control_model

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("wish", ["int8_tensorwise", "float8_e4m3fn", "bnb_nf4", "int8_blockwise"])
def test_a_control_lora_takes_the_decoded_weights_of_a_quantized_model(
    unet, quantize, control, wish
):
    quantized, _ = quantize(unet, wish, preset="none")
    before = list(quantized.model.diffusion_model.state_dict())
    taken = dict(control(quantized).named_parameters())
    checked = 0
    for name, layer in quantized.model.diffusion_model.named_modules():
        if getattr(layer, "quant_format", None) and f"{name}.weight" in taken:
            assert torch.equal(taken[f"{name}.weight"], layer.weight.dequantize()), name
            checked += 1
    assert checked > 8
    assert list(quantized.model.diffusion_model.state_dict()) == before


def test_a_control_lora_shares_the_weights_of_a_plain_model(unet, control):
    taken = dict(control(unet).named_parameters())
    own = dict(unet.model.diffusion_model.named_parameters())
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert taken[name].data_ptr() == own[name].data_ptr()
