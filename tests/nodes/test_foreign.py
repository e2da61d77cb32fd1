"""Foreign and fully packed files open in ComfyUI's own loaders and sample like the layers they hold."""

import inspect

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.kernels.packing import unswizzle_scales
from fewbits.quant_ops.doors import convert_file, inspect_file
from support import dialects
from support.helpers import flux_shapes, random_tensors, sd3_shapes

SHAPES = {"sd3": sd3_shapes, "flux": flux_shapes}
INNER = (
    "qkv.weight",
    "proj.weight",
    "linear1.weight",
    "linear2.weight",
    "mlp.0.weight",
    "fc1.weight",
)


@pytest.fixture
def tensors(family):
    return random_tensors(SHAPES[family]())


@pytest.fixture
def load(comfy, tmp_path):
    """Write a state dict and open it with what UNETLoader calls."""

    def run(tensors, metadata=None):
        path = tmp_path / "foreign.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata
        )
        return comfy.sd.load_diffusion_model(str(path))

    return run


def converted(tensors, make, chosen=lambda name: name.endswith(INNER)):
    """Every chosen matrix in a dialect; `make(base, weight)` may also return the bias."""
    out = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith(".weight") and weight.dim() == 2 and chosen(name):
            del out[name]
            out.update(make(name.removesuffix(".weight"), weight.float()))
    return out


def everything(name):
    return True


def layers(model):
    return {
        name: module
        for name, module in model.model.diffusion_model.named_modules()
        if getattr(module, "quant_format", None)
    }


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


DIALECTS = {
    "bitsandbytes nf4": (dialects.bitsandbytes, "bnb_nf4", 0.95),
    "bitsandbytes fp4": (lambda b, w: dialects.bitsandbytes(b, w, "fp4"), "bnb_fp4", 0.93),
    "bitsandbytes nested": (dialects.nested, "bnb_nf4", 0.95),
    "D30 fp4": (lambda b, w: dialects.d30(b, w, "fp4"), "bnb_fp4", 0.93),
    "D14": (dialects.d14, "bnb_nf4", 0.95),
    "D19": (dialects.d19, "bnb_nf4", 0.95),
    "INT8-Fast": (dialects.int8_fast, "int8_tensorwise", 0.999),
    "INT8-Fast convrot": (lambda b, w: dialects.int8_fast(b, w, 64), "int8_tensorwise", 0.999),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("case", DIALECTS)
def test_the_stock_loader_opens_a_foreign_file(load, sample, tensors, case):
    make, name, least = DIALECTS[case]
    reference = sample(load(tensors))
    model = load(converted(tensors, make))
    found = layers(model)
    assert found and {module.quant_format for module in found.values()} == {name}
    assert cosine(sample(model), reference) >= least


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("case", ["bitsandbytes nf4", "D19"])
def test_a_file_with_every_matrix_packed_is_recognised(load, sample, tensors, case):
    """First and last projections too: their stored width is half of what ComfyUI would look for."""
    make, name, _ = DIALECTS[case]
    model = load(converted(tensors, make, everything))
    matrices = [
        key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.dim() == 2
    ]
    assert len(layers(model)) == len(matrices)
    assert cosine(sample(model), sample(load(tensors))) > 0.8


@pytest.mark.parametrize("name", ["bnb_nf4", "nvfp4"], ids=["ours", "ComfyUI's own"])
def test_a_native_file_with_every_matrix_packed_is_recognised(load, tensors, name):
    def make(base, weight):
        return dialects.under(base, *dialects.native(name, weight))

    model = load(converted(tensors, make, everything))
    assert model.model.diffusion_model.img_in.in_features == 64
    assert model.model.diffusion_model.params.context_in_dim == 768


def test_a_bitsandbytes_layer_computes_with_bitsandbytes_values(load, tensors):
    import bitsandbytes.functional as oracle

    name = "double_blocks.0.img_attn.qkv.weight"
    codes, state = oracle.quantize_4bit(
        tensors[name].float(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    pieces = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    model = load({**tensors, name: codes, **pieces})
    weight = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    assert torch.equal(weight.dequantize(), oracle.dequantize_4bit(codes, state))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("size", [0, 2])
def test_scaled_e5m2_stays_e5m2(load, sample, tensors, prefix, size):
    """ComfyUI's own conversion labels such layers e4m3fn and casts them again."""
    state = converted(tensors, lambda b, w: dialects.scaled_fp8(b, w * 3, "float8_e5m2"))
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    model = load({**state, f"{prefix}scaled_fp8": torch.zeros(size, dtype=torch.float8_e5m2)})
    found = layers(model)
    assert found and {module.quant_format for module in found.values()} == {"float8_e5m2"}
    qkv = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    original = tensors["double_blocks.0.img_attn.qkv.weight"].float() * 3
    assert float((qkv.dequantize().float() - original).norm() / original.norm()) < 0.08


def test_dummy_scales_do_not_turn_bf16_into_fp8(load, tensors):
    state = converted(tensors, dialects.scaled_fp8)
    state["img_in.scale_weight"] = torch.ones(1)
    model = load({**state, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)})
    weight = model.model.diffusion_model.img_in.weight
    assert "img_in" not in layers(model)
    assert torch.equal(weight.float(), tensors["img_in.weight"].float())


def test_row_scales_under_the_scalar_tag_become_our_format(load, tensors):
    def make(base, weight):
        return dialects.under(
            base, dialects.native("float8_e4m3fn_rowwise", weight)[0], {"format": "float8_e4m3fn"}
        )

    found = layers(load(converted(tensors, make)))
    assert {module.quant_format for module in found.values()} == {"float8_e4m3fn_rowwise"}


def compressed_nvfp4(base, weight):
    """NVFP4 of compressed-tensors: the low nibble first, scales in rows, a divisor for all."""
    stored, _ = dialects.native("nvfp4", weight)
    n, k = weight.shape
    grid = unswizzle_scales(stored["weight_scale"].view(torch.uint8), n, k // 16).contiguous()
    made = {
        "weight_packed": dialects.swapped(stored["weight"]),
        "weight_scale": grid.view(torch.float8_e4m3fn),
        "weight_global_scale": 1 / stored["weight_scale_2"].reshape(1),
        "input_global_scale": torch.tensor([3.0]),
    }
    return dialects.under(base, made)


def gptq(base, weight):
    """Symmetric 4-bit GPTQ of the first version."""
    k, groups = weight.shape[1], weight.shape[1] // 16
    scales = (weight.abs().view(len(weight), groups, 16).amax(-1) / 7).half()
    spread = scales.float().repeat_interleave(16, 1)
    codes = ((weight / spread).round().clamp(-8, 7) + 8).long().t()
    words = (codes.view(k // 8, 8, -1) << torch.arange(0, 32, 4)[:, None]).sum(1)
    made = {
        "qweight": words.to(torch.int32),
        "qzeros": torch.full((groups, len(weight) // 8), 0x77777777, dtype=torch.int32),
        "scales": scales.t(),
    }
    return dialects.under(base, made)


@pytest.mark.parametrize("make", [compressed_nvfp4, gptq])
def test_packed_codes_of_other_tools_sample_as_they_decode(load, sample, tensors, make, tmp_path):
    model = load(converted(tensors, make))
    decoded = tmp_path / "decoded.safetensors"
    convert_file(tmp_path / "foreign.safetensors", decoded, to="bf16")
    assert bool(layers(model)) is (make is compressed_nvfp4)
    latent = sample(model)
    assert cosine(latent, sample(load(load_file(decoded)))) > 0.995
    assert cosine(latent, sample(load(tensors))) > 0.9


def test_every_key_is_translated_whatever_prefix_the_loader_asks_about(comfy, tensors):
    state = dialects.bitsandbytes("text_encoders.clip_l.transformer.a", torch.randn(32, 64))
    state |= dialects.scaled_fp8("model.diffusion_model.b", torch.randn(32, 64))
    state["model.diffusion_model.scaled_fp8"] = torch.zeros(0)
    out, metadata = comfy.utils.convert_old_quants(
        dict(state), "model.diffusion_model.", metadata={"a": "b"}
    )
    assert (
        "text_encoders.clip_l.transformer.a.comfy_quant" in out
        and "model.diffusion_model.b.comfy_quant" in out
    )
    assert not any(
        "quant_state" in name or "scale_weight" in name or "scaled_fp8" in name for name in out
    )
    assert metadata == {"a": "b"}


def test_translating_twice_changes_nothing(comfy):
    from fewbits.nodes.bridge.seams.foreign import translate_state_dict
    from fewbits.nodes.bridge.seams.formats import OWNED

    state = dialects.bitsandbytes("a", torch.randn(32, 64))
    once, metadata = translate_state_dict(state, {}, OWNED)
    twice, again = translate_state_dict(once, metadata, OWNED)
    assert once is not state and twice is once and again is metadata


def test_plain_and_native_state_dicts_pass_untouched(comfy, tensors):
    from fewbits.nodes.bridge.seams.foreign import translate_state_dict
    from fewbits.nodes.bridge.seams.formats import OWNED

    assert translate_state_dict(tensors, {}, OWNED)[0] is tensors
    state = converted(tensors, lambda b, w: dialects.under(b, *dialects.native("float8_e4m3fn", w)))
    assert translate_state_dict(state, {}, OWNED)[0] is state


def test_what_cannot_be_read_is_refused_by_name(load, tensors):
    from fewbits.quant_ops.errors import CheckpointError

    state = converted(tensors, dialects.d14, lambda name: "img_attn.qkv" in name)
    del state["double_blocks.0.img_attn.qkv.bias"]
    with pytest.raises(
        CheckpointError, match="layer 'double_blocks.0.img_attn.qkv'.*give the original"
    ):
        load(state)


def test_the_logical_shapes_are_a_consistent_mapping(comfy):
    from fewbits.nodes.bridge.seams.detection import LogicalShapes, logical_weights

    state = {
        "plain.weight": torch.zeros(4, 4),
        **dialects.under("a", *dialects.native("bnb_nf4", torch.randn(32, 64))),
    }
    stand_ins = logical_weights(state)
    assert {name: tuple(t.shape) for name, t in stand_ins.items()} == {"a.weight": (32, 64)}
    view = LogicalShapes(state, stand_ins)
    assert (
        list(view.keys()) == list(state)
        and len(view) == len(state)
        and "a.weight" in view
        and "b" not in view
    )
    assert (
        view["a.weight"].shape
        == view.get("a.weight").shape
        == dict(view.items())["a.weight"].shape
        == (32, 64)
    )
    assert view["plain.weight"] is state["plain.weight"] and view.get("b") is None
    assert view["a.weight"].device.type == "meta"


@pytest.mark.parametrize("case", ["bitsandbytes nested", "D19", "INT8-Fast"])
def test_a_foreign_model_saves_as_our_own_file(load, save, sample, comfy, tensors, tmp_path, case):
    from fewbits.quant_ops.doors import verify_file

    make, name, _ = DIALECTS[case]
    model = load(converted(tensors, make))
    path = tmp_path / "saved.safetensors"
    save(model, path)
    found = verify_file(path)
    assert found.ok, found.to_text()
    assert {(layer.dialect, layer.format) for layer in found.layers} == {("comfy_quant", name)}
    assert torch.equal(sample(comfy.sd.load_diffusion_model(str(path))), sample(model))


def test_names_that_detection_changes_are_changed_in_what_is_loaded(comfy):
    """As Kandinsky 6 of ComfyUI 0.38 does it with diffusers' names."""
    from fewbits.nodes.bridge.seams.detection import _with_logical_shapes

    packed, marker = dialects.native("nvfp4", torch.randn(32, 64))
    state = dialects.under("old.a", packed, marker) | {"b.weight": torch.ones(2, 2)}
    given = dict(state)

    def detect(seen, prefix):
        for name in [name for name in seen if name.startswith("old.")]:
            seen[f"new.{name[4:]}"] = seen.pop(name)
        seen["c"] = seen.pop("b.weight")
        return tuple(seen["new.a.weight"].shape)

    assert _with_logical_shapes(detect, state, "") == (32, 64)
    assert set(state) == {f"new.{name[4:]}" for name in given if name[0] == "o"} | {"c"}
    for name, tensor in state.items():
        assert tensor is given["b.weight" if name == "c" else f"old.{name[4:]}"]


# ---- scaled FP8: what ComfyUI's own conversion reads, and what is said of it ----

DIFFUSION = "model.diffusion_model."
# Prefix of the layer and of the marker (None: there is none), name of the scale -> whether ComfyUI multiplies by it.
SCALED = {
    "marked": ("", "", "scale_weight", True),
    "marked below a prefix": (DIFFUSION, DIFFUSION, "scale_weight", True),
    "one marker for all of a checkpoint": (DIFFUSION, "", "scale_weight", True),
    "not marked": ("", None, "scale_weight", False),
    "not marked, scale of today": ("", None, "weight_scale", False),
    "marked, scale of today": ("", "", "weight_scale", False),
    "marked below a prefix of its own": ("unet.", "unet.", "scale_weight", False),
}


@pytest.fixture(params=SCALED)
def scaled(request):
    """(tensors of a diffusion model, whether ComfyUI multiplies by their scale)."""
    prefix, marker, scale, read = SCALED[request.param]
    codes = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    tensors = {f"{prefix}a.weight": codes, f"{prefix}a.{scale}": torch.tensor(0.5)}
    if marker is not None:
        tensors[f"{marker}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return tensors, read


def test_comfyui_reads_scaled_fp8_below_its_marker_only(comfy, scaled):
    tensors, read = scaled
    convert = inspect.unwrap(comfy.utils.convert_old_quants)
    whole, _ = convert(dict(tensors), "", metadata={})
    inside = {name.removeprefix(DIFFUSION): tensor for name, tensor in whole.items()}
    model, _ = convert(inside, "", metadata={})
    assert any(name.endswith(".comfy_quant") for name in model) == read


def test_scaled_fp8_is_said_to_open_in_stock_comfyui_where_that_reads_it(scaled, tmp_path):
    tensors, read = scaled
    save_file(tensors, tmp_path / "scaled.safetensors")
    says = inspect_file(tmp_path / "scaled.safetensors").loads_in
    assert says.startswith("loads in stock" if read else "needs FewBits")


def test_a_marker_that_is_no_json_stops_stock_comfyui(tmp_path):
    tensors, marker = dialects.native("float8_e4m3fn", torch.randn(64, 64))
    broken = dialects.under("a", tensors, marker) | {"a.comfy_quant": dialects.json_tensor([1])}
    save_file(broken, tmp_path / "broken.safetensors")
    assert inspect_file(tmp_path / "broken.safetensors").loads_in.startswith("needs FewBits")
    whole = dialects.under("a", tensors, marker)
    save_file(whole, tmp_path / "header.safetensors", {"_quantization_metadata": "{oops"})
    assert inspect_file(tmp_path / "header.safetensors").loads_in.startswith("needs FewBits")
