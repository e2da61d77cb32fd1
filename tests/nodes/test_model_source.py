"""ModelSource: a MODEL gives the tensors of the file it came from, with its weight patches applied."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.helpers import EMOJI, flux_shapes, random_tensors, sd3_shapes, tiny_checkpoint

LORA = EMOJI.with_name("emoji_lora_blue.safetensors")


@pytest.fixture
def source_of(comfy):
    from fewbits.nodes.bridge.model_io import ModelSource

    return ModelSource


@pytest.fixture
def with_lora(comfy):
    import comfy.utils

    def apply(model, strength=1.0):
        return comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(str(LORA)), strength, 0
        )[0]

    return apply


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_model_offers_its_files_names_order_dtypes_bytes_and_metadata(
    model, model_file, source_of
):
    from fewbits.quant_ops.checkpoint.header import read_header

    header, stored = read_header(model_file), load_file(model_file)
    assert (
        model.model.diffusion_model.state_dict()["final_layer.linear.weight"].dtype == torch.float32
    )  # loaded wider
    with source_of(model) as source:
        assert list(source.header.tensors.values()) == list(header.tensors.values())
        assert source.header.metadata == header.metadata
        assert source.header.warnings == ()
        for name, tensor in stored.items():
            assert torch.equal(bits(source.read(name)), bits(tensor)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_files_bytes_come_back_whatever_the_weights_were_cast_to(
    comfy, tmp_path, source_of, dtype
):
    path = tmp_path / "model.safetensors"
    save_file(random_tensors(flux_shapes(), torch.float32), path)
    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
    assert model.model.diffusion_model.img_in.weight.dtype == dtype
    with source_of(model) as source:
        for name, tensor in load_file(path).items():
            assert torch.equal(bits(source.read(name)), bits(tensor)), name


def test_weights_that_somebody_changed_in_place_count_more_than_the_file(
    model, model_file, source_of
):
    weight = model.model.diffusion_model.final_layer.linear.weight
    weight.mul_(3.0)
    with source_of(model) as source:
        assert torch.equal(source.read("final_layer.linear.weight").float(), weight)
        assert torch.equal(
            source.read("final_layer.linear.bias"), load_file(model_file)["final_layer.linear.bias"]
        )


def test_without_a_known_file_names_and_dtypes_are_the_models_own_widest_first(model, source_of):
    model.cached_patcher_init = None
    model.model.diffusion_model.final_layer.linear.half()
    with source_of(model) as source:
        specs = list(source.header.tensors.values())
        assert [spec.dtype for spec in specs] == ["F32"] * (len(specs) - 2) + ["F16", "F16"]
        assert [spec.name for spec in specs[:-2]] == sorted(spec.name for spec in specs[:-2])
        state = model.model.diffusion_model.state_dict()
        for name in state:
            assert torch.equal(source.read(name), state[name])


def test_a_file_that_is_gone_is_reported_and_the_models_own_dtypes_are_used(
    model, model_file, source_of
):
    model_file.unlink()
    with source_of(model) as source:
        assert {spec.dtype for spec in source.header.tensors.values()} == {"F32"}
        (warning,) = source.header.warnings
        assert "cannot be read again" in warning and "no such file" in warning


def test_names_that_comfyui_renames_while_loading_stay_the_files(comfy, tmp_path, source_of):
    published = {
        name.replace("_norm.weight", "_norm.scale"): t
        for name, t in random_tensors(flux_shapes()).items()
    }
    published = {name: t * 2 if name.endswith("scale") else t for name, t in published.items()}
    save_file(published, tmp_path / "flux.safetensors")
    with source_of(comfy.sd.load_diffusion_model(str(tmp_path / "flux.safetensors"))) as source:
        assert set(source.header.tensors) == set(published)
        assert torch.equal(
            source.read("single_blocks.0.norm.query_norm.scale"), torch.full((128,), 2.0).bfloat16()
        )


def test_of_a_checkpoint_only_the_diffusion_model_is_offered_under_its_own_names(
    comfy, tmp_path, source_of
):
    inner = random_tensors(sd3_shapes())
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in inner.items()}
    tensors["first_stage_model.decoder.conv_in.weight"] = torch.zeros(4, 16, 3, 3)
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    model = comfy.sd.load_checkpoint_guess_config(
        str(tmp_path / "checkpoint.safetensors"), output_vae=False, output_clip=False
    )[0]
    with source_of(model) as source:
        assert set(source.header.tensors) == set(inner)
        for name, tensor in inner.items():
            assert torch.equal(bits(source.read(name)), bits(tensor)), name


def test_a_tensor_that_only_says_which_model_it_is_is_carried_along(comfy, tmp_path, source_of):
    save_file(
        {**random_tensors(flux_shapes()), "__some_flag__": torch.ones(3)},
        tmp_path / "flux.safetensors",
    )
    with source_of(comfy.sd.load_diffusion_model(str(tmp_path / "flux.safetensors"))) as source:
        assert torch.equal(source.read("__some_flag__"), torch.ones(3))


def test_where_comfyui_builds_other_weights_than_the_file_has_its_own_names_are_used(
    model, source_of, monkeypatch
):
    def doubled(self, state):
        state = dict(state)
        whole = state.pop("final_layer.linear.weight")
        return {**state, "final_layer.linear.weight": whole * 2}  # not what the MODEL holds

    monkeypatch.setattr(type(model.model.model_config), "process_unet_state_dict", doubled)
    with source_of(model) as source:
        state = model.model.diffusion_model.state_dict()
        assert set(source.header.tensors) == set(state)
        assert source.header.tensors["final_layer.linear.weight"].dtype == "F32"
        assert source.header.tensors["final_layer.linear.bias"].dtype == "BF16"
        assert torch.equal(
            source.read("final_layer.linear.weight"), state["final_layer.linear.weight"]
        )


def test_v_prediction_is_stated_as_comfyui_states_it_when_saving(model, source_of):
    import comfy.model_base

    model.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    with source_of(model) as source:
        assert source.header.tensors["v_pred"].shape == (0,)
        assert source.read("v_pred").shape == (0,)


def test_weight_patches_are_applied_in_float32_and_the_model_stays_as_it_is(
    comfy, source_of, with_lora
):
    model = comfy.sd.load_diffusion_model(str(EMOJI))
    before = {
        name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()
    }
    stored, lora = load_file(EMOJI), load_file(LORA)
    patched = with_lora(model, 0.75)
    names = {key.removeprefix("diffusion_model.") for key in patched.patches}
    assert len(names) == 18
    with source_of(patched) as source:
        for name, tensor in stored.items():
            got = source.read(name)
            if name not in names:
                assert torch.equal(bits(got), bits(tensor)), name
                continue
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            up, down = (lora[f"{layer}.lora_{side}.weight"].float() for side in "BA")
            assert got.dtype == torch.float32
            assert torch.equal(got, tensor.float() + 0.75 * (up @ down)), name
    for name, tensor in model.model.diffusion_model.state_dict().items():
        assert torch.equal(bits(tensor), bits(before[name])), name


def test_a_lora_that_sampling_has_put_into_the_weights_is_neither_kept_nor_applied_twice(
    comfy, source_of, with_lora, sample
):
    model = comfy.sd.load_diffusion_model(str(EMOJI))
    patched = with_lora(model)
    with source_of(patched) as source:
        fresh = source.read("single_blocks.0.linear1.weight")
    sample(patched, 256)
    assert not torch.equal(
        model.model.diffusion_model.img_in.weight, load_file(EMOJI)["img_in.weight"].float()
    )
    with source_of(model) as source:
        assert torch.equal(source.read("img_in.weight"), load_file(EMOJI)["img_in.weight"])
    sample(patched, 256)
    with source_of(patched) as source:
        assert torch.equal(source.read("single_blocks.0.linear1.weight"), fresh)


def test_a_lora_that_widens_a_layer_is_planned_with_the_wider_shape(model, source_of):
    wide = torch.ones(64, 192)
    model.add_patches(
        {"diffusion_model.final_layer.linear.weight": ("diff", (wide, {"pad_weight": True}))}
    )
    with source_of(model) as source:
        assert source.header.tensors["final_layer.linear.weight"].shape == (64, 192)
        assert source.read("final_layer.linear.weight").shape == (64, 192)


def test_weights_that_only_their_own_loader_can_read_are_refused(model, source_of):
    from fewbits.quant_ops.errors import UnsupportedLayerError

    class PackedTensor(torch.Tensor):
        pass

    layer = model.model.diffusion_model.final_layer.linear
    layer.weight = torch.nn.Parameter(
        layer.weight.data.as_subclass(PackedTensor), requires_grad=False
    )
    with pytest.raises(
        UnsupportedLayerError, match=r"'final_layer.linear'.*PackedTensor.*load a safetensors file"
    ):
        source_of(model)


def test_a_model_without_a_diffusion_model_is_refused(model, source_of):
    from fewbits.quant_ops.errors import QuantError

    del model.model.diffusion_model
    with pytest.raises(QuantError, match="no diffusion model inside"):
        source_of(model)


def test_it_also_works_outside_inference_mode(tmp_path, comfy, source_of, with_lora):
    with (
        torch.inference_mode(False),
        source_of(with_lora(comfy.sd.load_diffusion_model(str(EMOJI)))) as source,
    ):
        for name in source.header.tensors:
            assert not source.read(name).requires_grad


def test_a_file_without_metadata_gives_none(comfy, tmp_path, source_of):
    path = tiny_checkpoint(tmp_path / "plain.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata() is None
    with source_of(comfy.sd.load_diffusion_model(str(path))) as source:
        assert source.header.metadata == {}
