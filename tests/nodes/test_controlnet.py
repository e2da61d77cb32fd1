"""ControlNet files: plain ones open as ever, quantized ones are refused by name instead of giving noise."""

import pytest
import torch
from safetensors.torch import save_file

from support import dialects


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
