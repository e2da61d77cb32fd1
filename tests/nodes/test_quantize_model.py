"""MODEL -> MODEL: what the new one computes, what it carries over, and that the old one stays as it is."""

import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.formats import FORMATS
from support.helpers import EMOJI

LORA = EMOJI.with_name("emoji_lora_blue.safetensors")
BOTH = pytest.mark.parametrize("family", ["sd3", "flux"])


def relative_error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def weights(model):
    """Every stored tensor of the diffusion model as bytes."""
    state = model.model.diffusion_model.state_dict()
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).clone()
        for name, tensor in state.items()
    }


def on_another_gpu(model):
    """A copy with weights of its own, as ComfyUI makes one for each further GPU."""
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no multi-GPU copies (0.24 on)")
    return model.deepclone_multigpu()


def reloaded(model):
    factory, arguments = model.cached_patcher_init
    return factory(*arguments, disable_dynamic=True)


def assert_equal_weights(got, wanted):
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@BOTH
# Measured: 0.019 and 0.022 with FP8, 0.0070 to 0.0078 with INT8 (torch 2.11, CPU).
@pytest.mark.parametrize(
    "wish, limit", [("float8_e4m3fn", 0.06), ("int8_tensorwise", 0.03), ("int8_blockwise", 0.03)]
)
def test_the_new_model_samples_like_the_old_one_and_the_old_one_is_unchanged(
    model, quantize, sample, wish, limit
):
    before, wanted = weights(model), sample(model)
    quantized, report = quantize(model, wish)
    assert {row["format"] for row in report.to_json()["layers"]} == {wish, None}
    got = sample(quantized)
    assert 0 < relative_error(got, wanted) < limit
    assert torch.equal(sample(model), wanted)
    assert_equal_weights(weights(model), before)


def test_the_new_model_is_what_comfyui_loads_from_the_saved_file(
    comfy, model, quantize, sample, save, tmp_path
):
    quantized, _ = quantize(model)
    save(quantized, tmp_path / "saved.safetensors")
    loaded = comfy.sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    assert_equal_weights(weights(loaded), weights(quantized))
    assert torch.equal(sample(loaded), sample(quantized))


def test_saving_what_comfyui_loaded_gives_the_same_file_again(
    comfy, model, quantize, save, tmp_path
):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save(quantize(model)[0], first)
    save(comfy.sd.load_diffusion_model(str(first)), second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wish", [*FORMATS, "int8_tensorwise:scaling=tensor", "int8_tensorwise:convrot=true"]
)
def test_every_format_saves_to_the_bytes_that_the_file_door_writes(
    model, model_file, quantize, save, tmp_path, wish
):
    from fewbits.quant_ops.doors import quantize_file
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    save(quantize(model, wish)[0], tmp_path / "model.safetensors")
    quantize_file(model_file, tmp_path / "file.safetensors", Recipe(parse_wish(wish)))
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "file.safetensors"
    ).read_bytes()


def test_saving_an_unquantized_model_is_a_copy_of_its_tensors(model, model_file, save, tmp_path):
    report = save(model, tmp_path / "copy.safetensors")
    assert (
        report.results == ()
        and report.plan.loads_in() == "loads in stock ComfyUI (nothing is quantized)"
    )
    copy, original = load_file(tmp_path / "copy.safetensors"), load_file(model_file)
    assert {name: tensor.dtype for name, tensor in copy.items()} == {
        name: tensor.dtype for name, tensor in original.items()
    }
    assert all(torch.equal(copy[name], original[name]) for name in original)


def test_a_baked_lora_gives_the_codes_of_the_merged_file(comfy, quantize, save, tmp_path):
    import comfy.utils

    from fewbits.quant_ops.doors import quantize_file
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    merged, lora = load_file(EMOJI), load_file(LORA)
    for key in [key for key in lora if key.endswith("lora_A.weight")]:
        name = key.removeprefix("diffusion_model.").replace("lora_A.", "")
        up, down = lora[key.replace("lora_A", "lora_B")].float(), lora[key].float()
        merged[name] = merged[name].float() + up @ down
    save_file(merged, tmp_path / "merged.safetensors")
    quantize_file(
        tmp_path / "merged.safetensors",
        tmp_path / "wanted.safetensors",
        Recipe(parse_wish("int8_tensorwise")),
    )

    model = comfy.sd.load_diffusion_model(str(EMOJI))
    patched, _ = comfy.sd.load_lora_for_models(
        model, None, comfy.utils.load_torch_file(str(LORA)), 1.0, 0
    )
    save(quantize(patched)[0], tmp_path / "got.safetensors")
    wanted, got = (
        load_file(tmp_path / "wanted.safetensors"),
        load_file(tmp_path / "got.safetensors"),
    )
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():  # a kept layer is rounded to the dtype of the MODEL's file
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name


def test_a_lora_on_quantized_layers_is_saved_as_comfyui_rounds_it(
    comfy, quantize, save, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEWBITS_LORA", "bake")
    import comfy.model_management
    import comfy.utils

    quantized, _ = quantize(comfy.sd.load_diffusion_model(str(EMOJI)))
    patched, _ = comfy.sd.load_lora_for_models(
        quantized, None, comfy.utils.load_torch_file(str(LORA)), 1.0, 0
    )
    before = weights(quantized)
    report = save(patched, tmp_path / "saved.safetensors")
    assert "16 quantized layers carry a LoRA" in " ".join(report.plan.warnings)
    assert_equal_weights(weights(quantized), before)
    comfy.model_management.load_models_gpu([patched])
    running, saved = (
        patched.model.diffusion_model.state_dict(),
        load_file(tmp_path / "saved.safetensors"),
    )
    for name, tensor in running.items():
        if name.endswith("comfy_quant"):
            continue
        assert torch.equal(saved[name], tensor.to(saved[name].dtype)), name
    comfy.model_management.unload_all_models()
    assert_equal_weights(weights(quantized), before)


def test_a_quantized_model_is_refused_with_its_formats(model, quantize):
    from fewbits.quant_ops.errors import QuantError

    quantized, _ = quantize(model)
    with pytest.raises(
        QuantError, match=r"quantized already \(int8_tensorwise, \d+ layers\).*connect the original"
    ):
        quantize(quantized, "float8_e4m3fn")


def test_what_is_not_a_weight_is_carried_over_and_weight_patches_are_not(comfy, model, quantize):
    import comfy.hooks
    import comfy.model_sampling
    from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

    class Shifted(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    model = model.clone()
    sampling = Shifted(model.model.model_config)
    sampling.set_parameters(shift=2.5)
    model.add_object_patch("model_sampling", sampling)
    model.model_options["transformer_options"]["patches_replace"] = {
        "dit": {("double_block", 0): "patch"}
    }
    model.set_model_sampler_cfg_function(len)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "key", max)
    model.add_callback_with_key(CallbacksMP.ON_LOAD, "key", min)
    model.set_attachments("attachment", "value")
    model.set_injections("injection", [PatcherInjection(inject=min, eject=max)])
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    model.forced_hooks = hooks
    model.add_patches({"diffusion_model.final_layer.linear.bias": (torch.ones(64),)})

    new, _ = quantize(model)
    assert new.object_patches["model_sampling"] is sampling
    assert new.model_options["transformer_options"] == model.model_options["transformer_options"]
    assert new.model_options["sampler_cfg_function"] is model.model_options["sampler_cfg_function"]
    assert new.get_wrappers(WrappersMP.APPLY_MODEL, "key") == [max]
    assert new.get_all_callbacks(CallbacksMP.ON_LOAD) == [min]
    assert new.get_attachment("attachment") == "value"
    assert new.get_injections("injection") == model.get_injections("injection")
    assert new.forced_hooks.hooks == hooks.hooks
    assert new.patches == {} and model.patches != {}
    assert torch.equal(
        new.model.diffusion_model.final_layer.linear.bias, torch.ones(64)
    )  # it is in the weights now
    assert new.parent is None and new.model is not model.model
    assert new.patches_uuid != model.patches_uuid


def test_the_sampling_shift_of_the_old_model_is_used(comfy, model, quantize, sample):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    (shifted,) = ModelSamplingFlux().patch(model, 3.0, 3.0, 64, 64)
    wanted, plain = sample(shifted), sample(model)
    got = sample(quantize(shifted)[0])
    assert relative_error(got, wanted) < 0.03 < relative_error(plain, wanted)


def test_a_patched_method_of_a_layer_belongs_to_the_new_models_layer(model, quantize, sample):
    seen = []

    def forward(self, x):
        seen.append(self)
        return type(self).forward(self, x)

    model = model.clone()
    layer = model.model.diffusion_model.final_layer.linear
    model.add_object_patch(
        "diffusion_model.final_layer.linear.forward", types.MethodType(forward, layer)
    )
    new, _ = quantize(model)
    sample(new)
    assert set(seen) == {new.model.diffusion_model.final_layer.linear}


def test_a_replaced_part_that_holds_the_old_weights_is_refused(model, quantize):
    from fewbits.quant_ops.errors import UnsupportedLayerError

    model = model.clone()
    compiled = torch.nn.Sequential(model.model.diffusion_model.final_layer)
    model.add_object_patch("diffusion_model.final_layer", compiled)
    with pytest.raises(
        UnsupportedLayerError, match=r"'diffusion_model.final_layer' was replaced.*quantize first"
    ):
        quantize(model)


@BOTH
@pytest.mark.parametrize(
    "copy", [lambda model: model.clone(), on_another_gpu, reloaded], ids=["clone", "GPU", "reload"]
)
def test_copies_of_a_quantized_model_sample_to_the_same_latent(model, quantize, sample, copy):
    quantized, _ = quantize(model)
    wanted = sample(quantized)
    assert torch.equal(sample(copy(quantized)), wanted)


def test_copies_start_from_the_codes_even_while_a_lora_is_in_the_weights(comfy, quantize, sample):
    import comfy.utils

    quantized, _ = quantize(comfy.sd.load_diffusion_model(str(EMOJI)))
    wanted = sample(quantized, 256)
    lora = comfy.utils.load_torch_file(str(LORA))
    patched, _ = comfy.sd.load_lora_for_models(quantized, None, lora, 1.0, 0)
    with_lora = sample(patched, 256)
    assert torch.equal(sample(on_another_gpu(quantized), 256), wanted)
    assert torch.equal(sample(on_another_gpu(patched), 256), with_lora)
    assert torch.equal(sample(quantized, 256), wanted)


def test_what_comfyui_read_off_a_checkpoint_beside_the_weights_stays(model, quantize):
    model.model.latent_format = types.SimpleNamespace(scale_factor=0.5)
    model.model.model_sampling.shift = 7.0
    new, _ = quantize(model)
    for made in (new, reloaded(new)):
        assert made.model.latent_format.scale_factor == 0.5
        assert made.model.model_sampling.shift == 7.0
    assert (
        new.model.model_sampling is not model.model.model_sampling
    )  # it moves between devices with its model


def test_nan_in_a_weight_is_an_error_that_names_it_and_no_model_results(model, quantize):
    from fewbits.quant_ops.errors import CheckpointError

    model.model.diffusion_model.single_blocks[0].linear1.weight[3, 5] = float("nan")
    with pytest.raises(
        CheckpointError,
        match=r"flux.safetensors: tensor 'single_blocks.0.linear1.weight' has 1 NaN",
    ):
        quantize(model)


def test_cancelling_leaves_the_model_as_it_was(model, sample):
    import comfy.model_management

    from fewbits.nodes.bridge.host import Run
    from fewbits.nodes.bridge.model_io import quantize_model
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    wanted = sample(model)
    run = Run(None)

    def cancel_halfway(done, total, layer):
        if done > total / 2:
            comfy.model_management.interrupt_current_processing()
        run.on_progress(done, total, layer)

    recipe = Recipe(parse_wish("int8_tensorwise"))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        quantize_model(model, recipe, device="cpu", on_plan=run.on_plan, on_progress=cancel_halfway)
    assert torch.equal(sample(model), wanted)
