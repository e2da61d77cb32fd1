"""Models under diffusers' names: converted to what ComfyUI itself makes of them, tensor by tensor."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.checkpoint.diffusers import names_of, renamed
from fewbits.quant_ops.doors import (
    convert_file,
    inspect_file,
    quantize_file,
    repair_file,
    verify_file,
)
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.sources import MemorySource
from fewbits.quant_ops.spec import LayerInput
from support import dialects

WIDE = 64  # hidden size of the small models; a head
SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    "transformer_depth_middle": 3,
}
SD15 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
KOALA = {
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    "transformer_depth_middle": 5,
}


def maps(utils):
    """model -> ComfyUI's own map of names, for small depths."""
    return {
        "flux": utils.flux_to_diffusers(
            {"depth": 2, "depth_single_blocks": 3, "hidden_size": WIDE}
        ),
        # as many blocks as its width says, and fewer
        "sd3": utils.mmdit_to_diffusers({"depth": 2, "num_blocks": 2}),
        "pixart": utils.pixart_to_diffusers({"depth": 2, "hidden_size": WIDE}),
        "auraflow": utils.auraflow_to_diffusers({"n_double_layers": 2, "n_layers": 4}),
        "z_image": utils.z_image_to_diffusers({"n_layers": 2, "dim": WIDE}),
        "sdxl": utils.unet_to_diffusers(SDXL),
        "sd15": utils.unet_to_diffusers(SD15),
        "koala": utils.unet_to_diffusers(KOALA),
    }


MODELS = ["flux", "sd3", "pixart", "auraflow", "z_image", "sdxl", "sd15", "koala"]
ALIASES = (".ff.linear_", ".ff_context.linear_", ".attn.to_qkv_mlp_proj", "class_embedding.")
ROWS = {"sd3": 2 * WIDE}


def source_of(model, names):
    """A random tensor under every name that one file holds."""
    generator = torch.Generator().manual_seed(1)
    rows = ROWS.get(model, WIDE)
    tensors = {}
    for name, place in names.items():
        if model != "auraflow" and any(alias in name for alias in ALIASES):
            continue
        if model == "flux" and name.startswith("single") and name.endswith("attn.to_out.weight"):
            continue
        tall = 4 * rows if isinstance(place, tuple) and "proj_mlp" in name else rows
        shape = (tall,) if name.endswith("bias") else (tall, 16)
        tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    return tensors


def made_by_comfyui(comfy, model, names, tensors):
    """What ComfyUI's loader makes of a file: `convert_diffusers_mmdit`, or the names of a UNet."""
    import comfy.model_detection as detection

    state = {name: tensor.clone() for name, tensor in tensors.items()}
    if model in ("sdxl", "sd15", "koala"):
        return {names[name]: state[name] for name in names if name in state}
    return detection.convert_diffusers_mmdit(state, "")


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_what_comfyui_makes_of_it(comfy, monkeypatch, model):
    import comfy.utils

    names = maps(comfy.utils)[model]
    tensors = source_of(model, names)
    if model == "pixart":  # whose width ComfyUI takes for granted
        monkeypatch.setattr(comfy.utils, "pixart_to_diffusers", lambda *args, **kwargs: names)
    wanted = made_by_comfyui(comfy, model, names, tensors)
    source = renamed(MemorySource(tensors, {}, "m"))
    assert set(source.header.tensors) == set(wanted)
    for name, tensor in wanted.items():
        spec = source.header.tensors[name]
        assert spec.shape == tuple(tensor.shape) and torch.equal(source.read(name), tensor), name
    assert source.header.warnings == ()


@pytest.mark.parametrize("model", MODELS)
def test_every_name_of_comfyuis_maps_is_known_here_at_its_place(comfy, model):
    import comfy.utils

    names = maps(comfy.utils)[model]
    known = names_of(MemorySource(source_of(model, names), {}, "m").header.tensors)
    for name, place in names.items():
        target = place if isinstance(place, str) else place[0]
        if ".to_qkv_mlp_proj" in name or name.endswith("attn.to_out.weight"):
            continue  # of Flux.2, whose other names ComfyUI does not map
        base, _, suffix = name.rpartition(".")
        whole, layer = known.place(name), known.place(base)
        kept = name if known.others else None
        got = f"{layer.target}.{suffix}" if layer else kept
        assert (whole.target if whole else got) == target, name


def test_comfyuis_own_names_are_left_alone(comfy):
    from support.helpers import flux_shapes, random_tensors, sd3_shapes

    for shapes in (flux_shapes(), sd3_shapes()):
        source = MemorySource(random_tensors(shapes), {}, "m")
        assert renamed(source) is source


def test_a_diffusers_flux_is_quantized_to_the_same_file_through_every_door(
    comfy, quantize, save, tmp_path
):
    """Depths and widths of the smallest Flux that ComfyUI detects."""
    from support.helpers import flux_shapes, random_tensors

    tensors = random_tensors(flux_shapes())
    names = comfy.utils.flux_to_diffusers(
        {"depth": 8, "depth_single_blocks": 8, "hidden_size": tensors["img_in.bias"].shape[0]}
    )
    theirs = {}
    for name, place in names.items():
        target, *rows = (place,) if isinstance(place, str) else place
        if target not in tensors or any(alias in name for alias in ALIASES):
            continue
        if name.startswith("single") and name.endswith(("attn.to_out.weight",)):
            continue
        tensor = tensors[target]
        if len(rows) == 2:  # halves change places
            tensor = torch.cat(tensor.chunk(2)[::-1])
        elif rows:
            tensor = tensor.narrow(*rows[0])
        theirs[name] = tensor.contiguous()
    save_file(theirs, tmp_path / "diffusers.safetensors")
    save_file(tensors, tmp_path / "ours.safetensors")
    out = {}
    for name in ("diffusers", "ours"):
        path = tmp_path / f"{name}_int8.safetensors"
        report = quantize_file(tmp_path / f"{name}.safetensors", path, Recipe(parse_wish("int8")))
        assert report.plan.family == "flux"
        out[name] = load_file(path)
    assert out["diffusers"].keys() == out["ours"].keys()
    assert all(torch.equal(out["diffusers"][name], tensor) for name, tensor in out["ours"].items())
    assert "diffusers" in inspect_file(tmp_path / "diffusers.safetensors").family
    comfy.sd.load_diffusion_model(str(tmp_path / "diffusers_int8.safetensors"))
    in_graph, _ = quantize(
        comfy.sd.load_diffusion_model(str(tmp_path / "diffusers.safetensors")), "int8"
    )
    save(in_graph, tmp_path / "graph.safetensors")
    saved = load_file(tmp_path / "graph.safetensors")
    assert saved.keys() == out["ours"].keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in out["ours"].items())


def test_a_missing_piece_is_refused_by_name(comfy):
    import comfy.utils

    tensors = source_of("flux", maps(comfy.utils)["flux"])
    del (
        tensors["transformer_blocks.1.attn.to_k.weight"],
        tensors["transformer_blocks.1.attn.to_k.bias"],
    )
    with pytest.raises(CheckpointError, match="'double_blocks.1.img_attn.qkv' cannot be made: .*3"):
        renamed(MemorySource(tensors, {}, "m"))


def test_what_comfyui_leaves_out_is_left_out_with_a_warning(comfy):
    import comfy.utils

    tensors = source_of("flux", maps(comfy.utils)["flux"])
    source = renamed(MemorySource({**tensors, "extra.weight": torch.ones(4, 4)}, {}, "m"))
    assert source.header.warnings == (
        "1 tensors are left out, as ComfyUI knows no place for them: 'extra.weight'",
    )


# Layers of models whose other names in diffusers are Flux's.
OTHER_MODELS = {
    "Chroma": "distilled_guidance_layer.layers.0.linear_1.weight",
    "FIBO": "caption_projection.0.linear.weight",
    "LongCat-Image": "time_embed.timestep_embedder.linear_2.weight",
}


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_another_model_under_the_same_names_is_refused(comfy, tmp_path, model):
    import comfy.utils

    tensors = source_of("flux", maps(comfy.utils)["flux"])
    path, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    save_file({**tensors, OTHER_MODELS[model]: torch.randn(64, 64)}, path)
    assert any("layers are none of Flux" in text for text in inspect_file(path).findings)
    with pytest.raises(CheckpointError, match="1 layers are none of Flux .*another model"):
        quantize_file(path, out, Recipe(parse_wish("int8_tensorwise")))
    with pytest.raises(CheckpointError, match="1 layers are none of Flux .*another model"):
        convert_file(path, out)
    assert not out.exists()


# ---- quantized pieces ----


def pieces(wish, scales_alike=False):
    """A small Flux whose q, k and v are quantized one by one, and what they decode to."""
    import comfy.utils

    wish = parse_wish(wish)
    generator = torch.Generator().manual_seed(4)
    tensors = source_of("flux", maps(comfy.utils)["flux"])
    decoded = []
    for piece in ("to_q", "to_k", "to_v"):
        base = f"transformer_blocks.0.attn.{piece}"
        weight = torch.randn(128, 256, generator=generator)
        if scales_alike:
            weight[0, 0] = 8.0
        del tensors[f"{base}.weight"]
        tensors[f"{base}.bias"] = torch.randn(128, generator=generator).bfloat16()
        stored, marker = dialects.native(wish.format, weight, **wish.options.stated())
        tensors.update(dialects.under(base, stored, marker))
        layer = LayerInput((128, 256), None)
        decoded.append(get_format(wish.format).dequantize(stored, layer, wish.options))
    return tensors, torch.cat(decoded)


EXACT = {
    "int8_tensorwise": "int8_tensorwise",
    "int8_tensorwise:convrot=true": "int8_tensorwise",
    "int8_tensorwise:scaling=tensor": "int8_tensorwise",
    "float8_e4m3fn": "float8_e4m3fn_rowwise",
    "float8_e4m3fn_rowwise": "float8_e4m3fn_rowwise",
    "int8_blockwise": "int8_blockwise",
    "mxfp8": "mxfp8",
    "bnb_nf4": "bnb_nf4",
    "asym_w4a8_int8": "asym_w4a8_int8",
    "convrot_w4a4": "convrot_w4a4",
}
QKV = "double_blocks.0.img_attn.qkv"


@pytest.mark.slow
@pytest.mark.parametrize("wish", EXACT)
def test_quantized_pieces_are_put_together_exactly(comfy, tmp_path, wish):
    tensors, decoded = pieces(wish)
    path, out, plain = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "plain"))
    save_file(tensors, path)
    (found,) = verify_file(path).findings
    (line,) = inspect_file(path).findings
    assert found.to_text() == line and line.startswith("foreign-names")
    assert found.fix == "fewbits convert" and "see the problems" in inspect_file(path).loads_in
    convert_file(path, out)
    inspection = inspect_file(out)
    assert inspection.formats == {EXACT[wish]: 1} and inspection.findings == ()
    assert verify_file(out).ok
    bias = torch.cat([tensors[f"transformer_blocks.0.attn.to_{name}.bias"] for name in "qkv"])
    for source in (path, out):
        convert_file(source, plain, to="bf16", overwrite=True)
        stored = load_file(plain)
        assert torch.equal(stored[f"{QKV}.weight"], decoded.bfloat16())
        assert torch.equal(stored[f"{QKV}.bias"], bias)


@pytest.mark.parametrize("wish", ["int8_tensorwise:scaling=tensor", "float8_e4m3fn", "nvfp4"])
def test_equal_scales_stay_one(comfy, tmp_path, wish):
    tensors, _ = pieces(wish, scales_alike=True)
    save_file(tensors, tmp_path / "in.safetensors")
    convert_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert inspect_file(tmp_path / "out.safetensors").formats == {wish.partition(":")[0]: 1}
    assert load_file(tmp_path / "out.safetensors")[f"{QKV}.weight"].shape[0] == 384


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        ("nvfp4", "'.*weight_scale_2' differs between its pieces"),
        ("float8_e5m2", "its pieces have scales of their own in float8_e5m2"),
    ],
)
def test_pieces_that_cannot_be_put_together_exactly_are_refused(comfy, tmp_path, wish, why):
    save_file(pieces(wish)[0], tmp_path / "in.safetensors")
    for door in (convert_file, lambda a, b: quantize_file(a, b, Recipe(parse_wish(wish)))):
        with pytest.raises(CheckpointError, match=f"img_attn.qkv' cannot be made: {why}"):
            door(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


def test_a_repair_changes_no_names_and_says_what_is_left(comfy, tmp_path):
    save_file(pieces("int8_tensorwise")[0], tmp_path / "in.safetensors")
    done = repair_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert [finding.name for finding in done.left] == ["foreign-names"]
