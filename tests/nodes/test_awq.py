"""awq_w4a16, which a later ComfyUI reads and nothing here writes: it runs, is saved and inspected as it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import inspect_file, quantize_file, verify_file
from fewbits.quant_ops.errors import QuantError, UnsupportedLayerError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects
from support.helpers import flux_shapes, random_tensors

NAME, LAYOUT = "awq_w4a16", "TensorCoreAWQW4A16Layout"
LAYERS = ("double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin")
GROUP = 64


@pytest.fixture
def later(comfy, monkeypatch):
    """What ComfyUI's layers do with awq_w4a16 from 0.38 on, where this one does not know it."""
    import comfy.quant_ops as core
    import comfy_kitchen.tensor as kitchen

    if NAME in core.QUANT_ALGOS:
        return
    if not hasattr(kitchen, LAYOUT):
        pytest.skip("this comfy-kitchen has no awq_w4a16")
    entry = {
        "storage_t": torch.int8,
        "parameters": {"weight_scale"},
        "comfy_tensor_layout": LAYOUT,
        "quantize_input": False,
    }
    kitchen.register_layout_class(LAYOUT, kitchen.TensorCoreAWQW4A16Layout)
    monkeypatch.setitem(core.QUANT_ALGOS, NAME, entry)
    load, store = comfy.ops._load_quantized_module, comfy.ops._quantized_weight_state_dict

    def load_module(module, super_load, state, prefix, *args, **kwargs):
        text = state.get(f"{prefix}comfy_quant")
        marker = {} if text is None else json.loads(bytes(text.tolist()))
        if marker.get("format") != NAME:
            return load(module, super_load, state, prefix, *args, **kwargs)
        names = ("weight", "weight_scale", "weight_zeros", "comfy_quant")
        weight, scale, zeros, _ = (state.pop(f"{prefix}{name}") for name in names)
        params = kitchen.TensorCoreAWQW4A16Layout.Params(
            scale=scale,
            zeros=zeros,
            group_size=marker["group_size"],
            orig_dtype=module.factory_kwargs["dtype"],
            orig_shape=module._orig_shape,
        )
        module.quant_format, module.layout_type = NAME, LAYOUT
        module.weight = torch.nn.Parameter(
            kitchen.QuantizedTensor(weight, LAYOUT, params), requires_grad=False
        )
        missing = args[2]
        super_load(state, prefix, *args)
        missing.remove(f"{prefix}weight")

    def state_of(module, state, prefix, *args, **kwargs):
        made = store(module, state, prefix, *args, **kwargs)
        if getattr(module, "quant_format", None) == NAME:
            marker = {"format": NAME, "group_size": module.weight._params.group_size}
            made[f"{prefix}comfy_quant"] = torch.tensor(
                list(json.dumps(marker).encode()), dtype=torch.uint8
            )
        return made

    monkeypatch.setattr(comfy.ops, "_load_quantized_module", load_module)
    monkeypatch.setattr(comfy.ops, "_quantized_weight_state_dict", state_of)


def awq(base, weight):
    """Codes 0..15 of each group's range; scale and zero in the weight's dtype."""
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).to(torch.bfloat16)
    zeros = (low + 8 * scale.float()).to(torch.bfloat16)
    codes = ((groups - zeros.float()[..., None]) / scale.float()[..., None] + 8).round()
    codes = codes.clamp(0, 15).to(torch.uint8).view(n, k)
    stored = {
        "weight": (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8),
        "weight_scale": scale.t().contiguous(),
        "weight_zeros": zeros.t().contiguous(),
    }
    return dialects.under(base, stored, {"format": NAME, "group_size": GROUP})


@pytest.fixture
def path(later, tmp_path):
    tensors = random_tensors(flux_shapes())
    for base in LAYERS:
        tensors.update(awq(base, tensors.pop(f"{base}.weight")))
    path = tmp_path / "awq.safetensors"
    save_file(tensors, path)
    return path


def same(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def test_it_samples_like_its_decoded_weights(comfy, path, sample, tmp_path):
    from fewbits.quant_ops.doors import convert_file

    plain = tmp_path / "plain.safetensors"
    convert_file(path, plain, to="bf16")
    models = [comfy.sd.load_diffusion_model(str(file)) for file in (path, plain)]
    quantized = {
        name
        for name, module in models[0].model.diffusion_model.named_modules()
        if getattr(module, "quant_format", None)
    }
    assert quantized == set(LAYERS)
    got, wanted = (sample(model) for model in models)
    assert float((got - wanted).norm() / wanted.norm()) < 0.01


def test_save_comfy_quant_writes_the_layers_as_they_are(comfy, path, save, tmp_path):
    out = tmp_path / "out.safetensors"
    report = save(comfy.sd.load_diffusion_model(str(path)), out)
    assert same(load_file(out), load_file(path))
    assert (report.plan.min_comfyui, report.plan.requires_pack) == ("0.38.0", False)
    assert verify_file(out).ok and inspect_file(out).formats == {NAME: len(LAYERS)}


def test_a_patched_layer_is_refused_by_name_as_nothing_makes_its_codes(comfy, path, save, tmp_path):
    model = comfy.sd.load_diffusion_model(str(path))
    base = LAYERS[0]
    shape = tuple(model.model.diffusion_model.get_submodule(base).weight.shape)
    patch = {f"diffusion_model.{base}.weight": ("diff", (torch.ones(shape) / 100,))}
    model.add_patches(patch, 1.0)
    with pytest.raises(UnsupportedLayerError, match=f"layer '{base}'.*awq_w4a16.*original model"):
        save(model, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_in_graph_it_is_quantized_already_and_in_a_file_the_rest_is_quantized(
    comfy, path, quantize, tmp_path
):
    with pytest.raises(QuantError, match="quantized already .awq_w4a16, 2 layers"):
        quantize(comfy.sd.load_diffusion_model(str(path)))
    out = tmp_path / "out.safetensors"
    quantize_file(path, out, Recipe(parse_wish("int8")))
    before, after = load_file(path), load_file(out)
    for base in LAYERS:
        for suffix in ("weight", "weight_scale", "weight_zeros", "comfy_quant"):
            assert torch.equal(after[f"{base}.{suffix}"], before[f"{base}.{suffix}"])
    formats = inspect_file(out).formats
    assert formats[NAME] == len(LAYERS) and formats["int8_tensorwise"] > 0
    opened = comfy.sd.load_diffusion_model(str(out)).model.diffusion_model
    kinds = {getattr(module, "quant_format", None) for module in opened.modules()} - {None}
    assert kinds == {NAME, "int8_tensorwise"}
