"""CLIP -> CLIP: what the new one computes, what it keeps, and that the old one stays as it is."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.formats import FORMATS
from support.helpers import clip_shapes, random_tensors

pytestmark = pytest.mark.slow  # encoders quantized and run

HERE = [
    name for name in FORMATS if name != "asym_w4a8_int8"
]  # this comfy-kitchen has no layout for it
FOUR_BIT = {"bnb_nf4", "bnb_fp4", "nvfp4", "convrot_w4a4"}
# Measured (torch 2.11, CPU): INT8 0.016 to 0.026, FP8 0.062 to 0.075, float8_e5m2 0.14, 4 bit 0.23 to 0.32.
LIMITS = {
    "int8": 0.04,
    "mxfp8": 0.11,
    "float8_e4m3fn": 0.11,
    "float8_e5m2": 0.21,
    **dict.fromkeys(FOUR_BIT, 0.48),
}


@pytest.fixture
def clip_file(tmp_path):
    path = tmp_path / "clip_small.safetensors"
    save_file(random_tensors(clip_shapes(2, 128)), path)
    return path


@pytest.fixture
def load(comfy, small_clip):
    """What CLIPLoader calls, for the small encoder."""
    return lambda *paths, **kwargs: comfy.sd.load_clip(list(map(str, paths)), **kwargs)


@pytest.fixture
def clip(load, clip_file):
    return load(clip_file)


def relative_error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def limit(wish):
    return next(value for name, value in LIMITS.items() if wish.startswith(name))


def layers(clip):
    return {
        n: m for n, m in clip.cond_stage_model.named_modules() if getattr(m, "quant_format", None)
    }


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def weights(clip):
    return {name: tensor.clone() for name, tensor in clip.cond_stage_model.state_dict().items()}


def lora(strength=0.02):
    """A weight patch on one layer of the first block, as LoraLoader leaves it."""
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    delta = torch.randn(512, 128, generator=torch.Generator().manual_seed(5)) * strength
    return key, {key: ("diff", (delta,))}


@pytest.mark.parametrize("wish", HERE)
def test_the_new_encoder_is_smaller_and_says_nearly_the_same(clip, quantize_clip, wish, encode):
    before, wanted, size = weights(clip), encode(clip), clip.patcher.model_size()
    new, report = quantize_clip(clip, wish)
    assert report.plan.family == "clip"
    assert {module.quant_format for module in layers(new).values()} == {wish}
    assert len(layers(new)) == 12
    assert 0 < relative_error(encode(new), wanted) < limit(wish)
    saved = size - new.patcher.model_size()
    matrices = sum(
        tensor.nbytes
        for name, tensor in before.items()
        if "encoder.layers" in name and tensor.dim() == 2
    )
    assert saved > matrices * (0.65 if wish in FOUR_BIT else 0.4)
    assert torch.equal(encode(clip), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(clip).items())


@pytest.mark.parametrize("wish", HERE)
def test_its_layers_are_those_that_the_file_door_writes(
    clip, clip_file, quantize_clip, tmp_path, wish
):
    from fewbits.quant_ops.doors import quantize_file
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    quantize_file(clip_file, tmp_path / "file.safetensors", Recipe(parse_wish(wish)))
    stored = load_file(tmp_path / "file.safetensors")
    got = {
        name.removeprefix("clip_l.transformer."): t
        for name, t in weights(quantize_clip(clip, wish)[0]).items()
    }
    for name, tensor in stored.items():
        if name.endswith("comfy_quant"):
            continue  # ComfyUI writes its own formats' markers with fewer keys
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.to(got[name].dtype)  # ComfyUI's cast
        assert torch.equal(bits(got[name]), bits(tensor)), name


def test_the_quantized_file_opens_in_the_stock_loader_and_encodes_the_same(
    clip, clip_file, load, quantize_clip, tmp_path, encode
):
    from fewbits.quant_ops.doors import quantize_file
    from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

    path = tmp_path / "clip_nf4.safetensors"
    quantize_file(clip_file, path, Recipe(parse_wish("bnb_nf4")))
    assert torch.equal(encode(load(path)), encode(quantize_clip(clip, "bnb_nf4")[0]))


def test_what_is_not_a_weight_is_carried_over(clip, quantize_clip, encode):
    clip = clip.clone()
    clip.clip_layer(-2)
    clip.set_tokenizer_option("min_length", 5)
    clip.use_clip_schedule = True
    clip.patcher.model_options["transformer_options"] = {"mark": 1}
    clip.patcher.set_attachments("attachment", "value")
    key, patches = lora()
    clip.add_patches(patches)
    wanted = encode(clip)
    new, _ = quantize_clip(clip, "int8_tensorwise")
    assert new.layer_idx == -2 and new.tokenizer is clip.tokenizer and new.use_clip_schedule
    assert (
        new.tokenizer_options == {"min_length": 5}
        and new.tokenizer_options is not clip.tokenizer_options
    )
    assert new.patcher.model_options["transformer_options"] == {"mark": 1}
    assert new.patcher.get_attachment("attachment") == "value"
    assert new.patcher.patches == {} and key in clip.patcher.patches
    assert (
        new.patcher.is_clip
        and new.patcher.model is new.cond_stage_model is not clip.cond_stage_model
    )
    assert relative_error(encode(new), wanted) < 0.03


def test_a_lora_is_baked_in_before_rounding(clip, clip_file, quantize_clip, encode):
    from fewbits.quant_ops.formats import get_format
    from fewbits.quant_ops.spec import LayerInput

    key, patches = lora()
    patched = clip.clone()
    patched.add_patches(patches)
    new, _ = quantize_clip(patched, "bnb_nf4")
    name = key.removeprefix("clip_l.transformer.")
    merged = load_file(clip_file)[name].float() + patches[key][1][0]
    format = get_format("bnb_nf4")
    grid = format.grid(LayerInput((512, 128), "F32"), format.Options())
    scale = grid.scale(merged)
    wanted = grid.decode(grid.encode(merged, scale), scale)
    got = layers(new)[key.removesuffix(".weight")].weight.dequantize()
    assert torch.equal(got, wanted.to(got.dtype))
    assert not torch.equal(encode(quantize_clip(clip, "bnb_nf4")[0]), encode(new))


def reloaded(clip):
    factory, arguments = clip.patcher.cached_patcher_init[:2]
    return factory(*arguments, disable_dynamic=True)


@pytest.mark.parametrize("kernels", [False, True])
def test_copies_come_from_the_codes(clip, quantize_clip, kernels, encode):
    new, _ = quantize_clip(clip, "bnb_nf4", kernels)
    wanted = encode(new)
    copy = new.clone()
    copy.patcher = reloaded(new)
    copy.cond_stage_model = copy.patcher.model
    assert torch.equal(encode(copy), wanted)
    assert torch.equal(encode(new.clone()), wanted)


def test_unloading_and_loading_again_changes_nothing(comfy, clip, quantize_clip, encode):
    import comfy.model_management

    new, _ = quantize_clip(clip, "int8_blockwise")
    wanted = encode(new)
    comfy.model_management.unload_all_models()
    assert torch.equal(encode(new), wanted)
    key, patches = lora()
    patched = new.clone()
    patched.add_patches(patches)
    assert not torch.equal(encode(patched), wanted)
    assert torch.equal(encode(new), wanted)


@pytest.mark.parametrize("wish", ["bnb_nf4", "int8_blockwise", "int8_tensorwise"])
def test_quantized_kernels_run_when_asked_and_say_nearly_the_same(
    clip, quantize_clip, wish, encode, monkeypatch
):
    from fewbits.nodes.bridge.compat import weight_only_path
    from fewbits.nodes.bridge.kernels import DECODED, kernel_lines
    from fewbits.quant_ops.layouts.product import Product

    plain, fast = quantize_clip(clip, wish)[0], quantize_clip(clip, wish, True)[0]
    assert all(module._full_precision_mm for module in layers(plain).values())
    assert kernel_lines(plain.cond_stage_model) == [f"   12 layers  {wish}: {DECODED}"]
    own = "_fewbits_marker" in vars(next(iter(layers(fast).values())))
    decoded = encode(plain)
    products = []
    call = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda *args: products.append(1) or call(*args))
    got = encode(fast)
    if weight_only_path() or not own:
        assert not any(module._full_precision_mm for module in layers(fast).values())
        assert DECODED not in kernel_lines(fast.cond_stage_model)[0]
        assert len(products) == (12 if own else 0)
    assert torch.equal(got, decoded) == (
        wish == "bnb_nf4" or (own and not weight_only_path())
    )  # the others round x
    assert relative_error(got, decoded) < 0.03


def test_kernels_stay_off_where_the_file_or_the_device_says_so(clip, quantize_clip):
    precise, _ = quantize_clip(clip, "int8_tensorwise:full_precision_matrix_mult=true", True)
    assert all(module._full_precision_mm for module in layers(precise).values())
    fp8, _ = quantize_clip(clip, "float8_e4m3fn", True)  # no CPU multiplies FP8
    assert all(module._full_precision_mm for module in layers(fp8).values())


def test_a_quantized_clip_is_refused_with_its_formats(clip, quantize_clip):
    from fewbits.quant_ops.errors import QuantError

    with pytest.raises(
        QuantError,
        match=r"the CLIP is quantized already \(bnb_nf4, 12 layers\).*connect the original",
    ):
        quantize_clip(quantize_clip(clip, "bnb_nf4")[0], "float8_e4m3fn")


def test_a_clip_that_another_pack_built_is_refused(clip, quantize_clip):
    from fewbits.quant_ops.errors import QuantError

    del clip.cond_stage_model._fewbits_made
    with pytest.raises(QuantError, match="own way.*Quantize File"):
        quantize_clip(clip)


def test_a_file_that_is_gone_or_changed_leaves_the_weights_in_memory(
    clip, clip_file, quantize_clip, encode
):
    clip_file.unlink()
    new, report = quantize_clip(clip, "bnb_nf4")
    assert "cannot be read again" in " ".join(report.plan.warnings)
    assert relative_error(encode(new), encode(clip)) < limit("bnb_nf4")


def test_a_lookup_table_is_kept_without_a_preset_too(clip, quantize_clip):
    new, report = quantize_clip(clip, "float8_e4m3fn_rowwise", preset="none")
    kept = {layer.name: layer.reason for layer in report.plan.layers if layer.format is None}
    name = "clip_l.transformer.text_model.embeddings.position_embedding"
    assert kept[name].startswith("lookup table")
    assert name.removeprefix("clip_l.transformer.") not in layers(new)


def test_codes_that_comfyui_would_read_as_numbers_are_refused(comfy):
    from fewbits.nodes.bridge.weights import refuse_unread
    from fewbits.quant_ops.errors import UnsupportedLayerError

    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    refuse_unread({}, module)
    with pytest.raises(UnsupportedLayerError, match=r"layer 'x.a'.*plain numbers \(Linear\)"):
        refuse_unread({"x.a": "a"}, module)


def test_an_encoder_of_another_width_is_refused_in_one_sentence(comfy, clip_file):
    from fewbits.nodes.bridge.clip_io import load_files
    from fewbits.quant_ops.errors import CheckpointError

    with pytest.raises(CheckpointError) as caught:
        load_files([str(clip_file)], "stable_diffusion", on_cpu=True, kernels=False)
    said = str(caught.value)
    assert "clip_small.safetensors as stable_diffusion: " in said and "\n" not in said
    assert "[49408, 128] in the file, [49408, 768] in the encoder" in said and len(said) < 400


def test_a_format_that_this_device_has_no_kernels_for_stays_decoded(
    comfy, clip, quantize_clip, monkeypatch
):
    """A newer ComfyUI lists such formats: INT8 on MPS, for example."""
    names = {"int8_tensorwise"}
    monkeypatch.setattr(
        comfy.ops, "get_disabled_quant_formats", lambda device: names, raising=False
    )
    new, _ = quantize_clip(clip, "int8_tensorwise", True)
    assert all(module._full_precision_mm for module in layers(new).values())
    names.clear()
    new, _ = quantize_clip(clip, "int8_tensorwise", True)
    assert not any(module._full_precision_mm for module in layers(new).values())


def test_two_files_of_one_kind_are_told_apart_by_their_values(comfy, load, tmp_path):
    """SD3 takes CLIP-L twice; the second file's weights are those that are used."""
    from fewbits.nodes.bridge.clip_io import ClipSource

    first = random_tensors(clip_shapes(3, 128))
    second = {name: tensor * 1.5 for name, tensor in first.items()}
    save_file(first, tmp_path / "clip_small.safetensors")
    save_file(second, tmp_path / "second.safetensors")
    files = [tmp_path / name for name in ("clip_small.safetensors", "second.safetensors")]
    clip = load(*files, clip_type=comfy.sd.CLIPType.SD3)
    name = "text_model.encoder.layers.1.self_attn.q_proj.weight"
    with ClipSource(clip) as source:
        assert source.name == "clip_small.safetensors + second.safetensors"
        assert torch.equal(source.read(f"clip_l.transformer.{name}"), second[name])


@pytest.mark.parametrize("embedding", ["float8_e4m3fn", "int8_tensorwise"])
def test_a_quantized_embedding_looks_up_the_decoded_rows(clip, quantize_clip, embedding, encode):
    from fewbits.quant_ops.planning.recipe import Rule, parse_wish

    rules = (Rule("*token_embedding", parse_wish(embedding)),)
    new, _ = quantize_clip(clip, "int8_tensorwise", rules=rules)
    table = new.cond_stage_model.clip_l.transformer.text_model.embeddings.token_embedding
    assert table.quant_format == embedding
    ids = torch.tensor([[0, 5, 49407, 5]])
    wanted = torch.nn.functional.embedding(ids, table.weight.to(torch.float32).dequantize())
    # ComfyUI decodes INT8 rows to the encoder's float16 first.
    torch.testing.assert_close(table(ids, out_dtype=torch.float32), wanted, rtol=2**-10, atol=0)
    assert relative_error(encode(new), encode(clip)) < limit(embedding)
