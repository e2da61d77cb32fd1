"""What each seam relies on in ComfyUI: a change there fails the test of the seam that it breaks."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

ASKS = "get_plain_tensors("


def calls(function, name):
    """Whether a function of ComfyUI calls another one by this name."""
    return f"{name}(" in inspect.getsource(inspect.unwrap(function))


def takes(function, *names):
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    return [name for name in names if name not in parameters] == []


def formats(comfy):
    """A table from a format's name to its layout, codes and further parameters."""
    import comfy.quant_ops
    from comfy_kitchen.tensor import get_layout_class

    table = comfy.quant_ops.QUANT_ALGOS
    assert isinstance(table, dict)
    for name in ("float8_e4m3fn", "nvfp4"):
        entry = table[name]
        assert isinstance(entry["storage_t"], torch.dtype)
        assert {"weight_scale", "input_scale"} <= set(entry["parameters"])
        layout = get_layout_class(entry["comfy_tensor_layout"])
        assert all(hasattr(layout, part) for part in ("Params", "quantize", "dequantize"))


def layers(comfy):
    """Layers that are made per model, load by the state dict's hook and multiply in two methods."""
    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    assert takes(comfy.ops.mixed_precision_ops, "quant_config", "compute_dtype")
    assert issubclass(ops.Linear, comfy.ops.CastWeightBiasOp) and hasattr(ops, "_compute_dtype")
    linear = ops.Linear(32, 16, device="cpu", dtype=torch.float32)
    assert (linear.in_features, linear.out_features) == (32, 16)
    assert {"device", "dtype"} <= set(linear.factory_kwargs)
    assert isinstance(linear._full_precision_mm, bool)
    assert linear.weight_function == linear.bias_function == []
    core = next(base for base in type(linear).__mro__ if base.__module__ == "comfy.ops")
    assert takes(core.forward, "input") and takes(core._forward, "input", "weight", "bias")
    assert takes(core.forward_comfy_cast_weights, "input")
    assert takes(core.set_weight, "weight", "inplace_update", "seed", "return_weight")
    assert takes(core.convert_weight, "weight")
    assert takes(comfy.ops.cast_bias_weight, "s", "device", "dtype", "offloadable")
    assert takes(comfy.ops.uncast_bias_weight, "s", "weight", "bias", "offload_stream")


def text_encoders(comfy):
    """One class whose constructor takes the target, the weights and the model's options."""
    assert takes(comfy.sd.CLIP.__init__, "target", "state_dict", "model_options", "parameters")
    assert calls(comfy.sd.load_clip, "load_text_encoder_state_dicts")
    assert calls(comfy.sd.load_text_encoder_state_dicts, "CLIP")
    assert "quantization_metadata" in inspect.getsource(comfy.sd) or "quantization_metadata" in (
        inspect.getsource(__import__("comfy.sd1_clip", fromlist=["sd1_clip"]))
    )


def foreign(comfy):
    """Every loader sends what it has read through one function, which gives back both."""
    import comfy.utils

    assert takes(comfy.utils.convert_old_quants, "state_dict", "model_prefix", "metadata")
    state, metadata = comfy.utils.convert_old_quants({"a.weight": torch.ones(2)}, "", metadata={})
    assert set(state) == {"a.weight"} and isinstance(metadata, dict)
    for loader in (
        comfy.sd.load_diffusion_model_state_dict,
        comfy.sd.load_state_dict_guess_config,
        comfy.sd.load_clip,
    ):
        names = ("convert_old_quants", "load_text_encoder_state_dicts")
        assert any(calls(loader, name) for name in names), loader.__name__


def detection(comfy):
    """A function of its own looks at shapes, and is called by its name in the module."""
    import comfy.model_detection as module

    assert takes(module.detect_unet_config, "state_dict", "key_prefix")
    assert calls(module.model_config_from_unet, "detect_unet_config")


def merging(comfy):
    """Merging reads weights off the patcher's state dict, one entry a key."""
    from comfy.model_patcher import ModelPatcher

    assert calls(ModelPatcher.get_key_patches, "model_state_dict")
    model = torch.nn.Module()
    model.part = torch.nn.Linear(4, 4)
    found = ModelPatcher(model, "cpu", "cpu").get_key_patches()
    weight, convert = found["part.weight"][0]
    assert weight.shape == (4, 4) and callable(convert)


def controlnet(comfy):
    """Every loader of ControlNets ends in one function that takes the state dict."""
    import comfy.controlnet as module

    assert takes(module.load_controlnet_state_dict, "state_dict")
    assert calls(module.load_controlnet, "load_controlnet_state_dict")


def control_lora(comfy):
    """A ControlLora reads the weights of the model off its state dict before it runs."""
    import comfy.controlnet as module

    assert takes(module.ControlLora.pre_run, "model")
    assert "diffusion_model.state_dict()" in inspect.getsource(
        inspect.unwrap(module.ControlLora.pre_run)
    ).replace("model.diffusion_model", "diffusion_model")


def encoder_names(comfy):
    """Two functions rename OpenCLIP's weights and biases, and nothing beside them."""
    import comfy.diffusers_convert as saving
    import comfy.supported_models as models

    assert takes(saving.convert_text_enc_state_dict_v20, "text_enc_dict", "prefix")
    assert calls(models.SDXL.process_clip_state_dict, "clip_text_transformers_convert")
    for model in (models.SD20, models.SDXL, models.SDXLRefiner):
        assert calls(model.process_clip_state_dict_for_saving, "convert_text_enc_state_dict_v20")


def low_rank(comfy):
    """A patcher's patches are one dictionary by key, of which loading and unloading take what they
    find; a saved weight is patched by one function; and one function alone multiplies by a
    quantized weight without calling its layer.
    """
    from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic
    from comfy.weight_adapter.lora import LoRAAdapter

    for owner in (ModelPatcher, ModelPatcherDynamic):
        assert takes(owner.load, "device_to", "lowvram_model_memory", "force_patch_weights")
        assert "self.patches" in inspect.getsource(inspect.unwrap(owner.load))
    assert "weight_key in self.patches" in inspect.getsource(
        inspect.unwrap(ModelPatcher.partially_unload)
    )
    assert takes(ModelPatcher.unpatch_model, "device_to", "unpatch_weights")
    assert takes(ModelPatcher.model_state_dict_for_saving, "model", "prefix")
    assert takes(ModelPatcher.patch_weight_to_device, "key", "device_to", "return_weight")
    loaded = LoRAAdapter.load("x", {"x.lora_up.weight": torch.ones(4, 2), "x.lora_down.weight": torch.ones(2, 8)}, None, None)  # fmt: skip
    assert loaded.name == "lora" and len(loaded.weights) == 6
    model = torch.nn.Module()
    model.part = torch.nn.Linear(8, 4)
    patcher = ModelPatcher(model, "cpu", "cpu")
    patcher.add_patches({"part.weight": loaded}, 0.5)
    ((strength, adapter, of_model, offset, function),) = patcher.patches["part.weight"]
    assert (strength, adapter, of_model, offset, function) == (0.5, loaded, 1.0, None, None)
    assert patcher.weight_wrapper_patches == {}
    if hasattr(comfy.ops, "linear_input_act"):
        assert takes(comfy.ops.linear_input_act, "linear", "x", "input_act")
    assert products_of_codes(comfy) <= {"linear_input_act"}


def products_of_codes(comfy):
    """Functions in ComfyUI's files that ask a quantized weight for its plain tensors."""
    found = set()
    for path in Path(comfy.ops.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if ASKS not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and ASKS in ast.get_source_segment(text, node):
                found.add(node.name)
    return found - {"get_plain_tensors"}  # a layout's own


CONTRACTS = {
    function.__name__: function
    for function in (
        formats,
        layers,
        text_encoders,
        foreign,
        detection,
        merging,
        controlnet,
        encoder_names,
        control_lora,
        low_rank,
    )
}


@pytest.mark.parametrize("seam", CONTRACTS)
def test_comfyui_is_as_the_seam_needs_it(comfy, seam):
    CONTRACTS[seam](comfy)


def test_every_seam_has_a_contract(comfy):
    from fewbits.nodes.bridge import seams

    assert set(CONTRACTS) == set(seams.SEAMS)
