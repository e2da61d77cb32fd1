"""Load Text Encoder, Load Checkpoint, Load Model, Convert FP8 Scaled: what goes in, what comes out, and the report."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects
from support.helpers import clip_shapes, flux_shapes, gated_t5_shapes, random_tensors, sd3_shapes


@pytest.fixture
def models(host, tmp_path):
    return tmp_path / "models"


@pytest.fixture
def run(host, small_clip):
    """Run a node as ComfyUI does, by its id."""
    from fewbits.nodes.extension import NODES

    nodes = {node.define_schema().node_id: node for node in NODES}

    def run(name, **inputs):
        node = nodes[f"FewBits{name}"]
        node.hidden = type("Hidden", (), {"unique_id": "1"})
        node.define_schema()
        return node.execute(**inputs)

    return run


def clip_tensors(layers=2):
    return random_tensors(clip_shapes(layers, 128))


def quantized(tensors, format, inner="encoder.layers", **options):
    """A state dict with the inner matrices in one of our formats."""
    out = {}
    for name, tensor in tensors.items():
        if inner in name and tensor.dim() == 2:
            base = name.removesuffix(".weight")
            out |= dialects.under(base, *dialects.native(format, tensor.float(), **options))
        else:
            out[name] = tensor
    return out


def error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


DIALECTS = {
    "bnb_nf4": lambda base, w: dialects.under(base, *dialects.native("bnb_nf4", w)),
    "int8_tensorwise": lambda base, w: dialects.under(base, *dialects.native("int8_tensorwise", w)),
    "bitsandbytes": dialects.bitsandbytes,
    "scaled_fp8": dialects.scaled_fp8,
}


@pytest.mark.parametrize("case", DIALECTS)
def test_one_text_encoder_in_any_dialect(run, models, encode, case):
    tensors = clip_tensors()
    save_file(tensors, models / "text_encoders" / "plain.safetensors")
    out = {}
    for name, tensor in tensors.items():
        inner = "encoder.layers" in name and tensor.dim() == 2
        out.update(
            DIALECTS[case](name.removesuffix(".weight"), tensor.float())
            if inner
            else {name: tensor}
        )
    save_file(
        {n: t.contiguous() for n, t in out.items()}, models / "text_encoders" / "small.safetensors"
    )
    wanted = encode(
        run("LoadTextEncoder", file="plain.safetensors", type="stable_diffusion").args[0]
    )
    clip, report = run("LoadTextEncoder", file="small.safetensors", type="stable_diffusion").args
    format = {"bitsandbytes": "bnb_nf4", "scaled_fp8": "float8_e4m3fn"}.get(case, case)
    assert f"12 layers  {format}: decoded, then multiplied at full precision" in report
    assert "small.safetensors: " in report and "no problems found" in report
    assert ("in dialect" in report) == (case in ("bitsandbytes", "scaled_fp8"))
    assert 0 < error(encode(clip), wanted) < (0.48 if format == "bnb_nf4" else 0.11)


def full_precision_flags(patcher):
    layers = [layer for layer in patcher.model.modules() if getattr(layer, "layout_type", None)]
    return [layer._full_precision_mm for layer in layers]


def test_the_kernels_input_is_seen_in_the_report_and_outlives_a_reload(run, models, encode):
    from fewbits.nodes.bridge.compat import weight_only_path

    save_file(quantized(clip_tensors(), "bnb_nf4"), models / "text_encoders" / "nf4.safetensors")
    clip, report = run(
        "LoadTextEncoder", file="nf4.safetensors", type="stable_diffusion", quantized_kernels=True
    ).args
    if weight_only_path():
        assert "12 layers  bnb_nf4: FewBits' kernel" in report
    factory, arguments = clip.patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    flags = full_precision_flags(clip.patcher)
    assert flags == full_precision_flags(again)
    assert len(flags) == 12 and any(flags) == (not weight_only_path())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_files_go_to_comfyui_in_order(run, models, monkeypatch, comfy, count):
    seen = {}
    names = [f"{number}.safetensors" for number in range(1, count + 1)]
    for name in names:
        save_file(clip_tensors(), models / "text_encoders" / name)
    real = comfy.sd.load_clip

    def load_clip(ckpt_paths, **kwargs):
        seen.update(kwargs, ckpt_paths=ckpt_paths)
        return real(ckpt_paths[:1], **{**kwargs, "clip_type": comfy.sd.CLIPType.STABLE_DIFFUSION})

    monkeypatch.setattr(comfy.sd, "load_clip", load_clip)
    more = {f"file{number}": names[number - 1] for number in range(2, count + 1)}
    report = run("LoadTextEncoder", file=names[0], **more, type="sd3", device="cpu").args[-1]
    assert seen["ckpt_paths"] == [str(models / "text_encoders" / name) for name in names]
    assert seen["clip_type"] == comfy.sd.CLIPType.SD3
    assert seen["model_options"] == {
        "load_device": torch.device("cpu"),
        "offload_device": torch.device("cpu"),
    }
    assert "custom_operations" not in seen["model_options"]
    assert all(name in report for name in names)


# SD3 joins three encoders: the two CLIPs side by side, filled up to T5's width of 4096, and T5 after them.
CLIP_G = {"num_hidden_layers": 31, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2,
          "projection_dim": 128}  # fmt: skip
T5 = {"d_model": 4096, "d_ff": 256, "num_heads": 2, "num_layers": 1, "vocab_size": 2048}
SHORT = "a red car on a road"  # words among T5's first 2048
PLACES = {
    "l": (slice(77), slice(128)),
    "g": (slice(77), slice(128, 256)),
    "t5": (slice(77, None), slice(None)),
}


@pytest.fixture
def small_sd3(comfy, small_clip, monkeypatch):
    """CLIP-G and T5-XXL of few megabytes; CLIP-L as in `small_clip`."""
    import comfy.sd1_clip

    clip = comfy.sd1_clip.SDClipModel.__init__

    def __init__(self, *args, model_options=None, **kwargs):
        configs = {"clip_g_model_config": CLIP_G, "t5xxl_model_config": T5}
        clip(self, *args, model_options={**(model_options or {}), **configs}, **kwargs)

    monkeypatch.setattr(comfy.sd1_clip.SDClipModel, "__init__", __init__)


@pytest.mark.slow
def test_three_different_encoders_each_in_a_format_of_its_own(run, models, comfy, small_sd3):
    folder = models / "text_encoders"
    plain = {
        "l": clip_tensors(3),
        "g": random_tensors(clip_shapes(31, 128)),
        "t5": random_tensors(gated_t5_shapes(**T5)),
    }
    formats = {"l": "bnb_nf4", "g": "int8_blockwise", "t5": "int8_tensorwise"}
    for name, tensors in plain.items():
        save_file(tensors, folder / f"{name}.safetensors")
        quantize_file(
            folder / f"{name}.safetensors",
            folder / f"{name}_small.safetensors",
            Recipe(parse_wish(formats[name])),
        )

    def embed(*names):
        """By ComfyUI's own function for the stock loaders, and by the node, which must agree."""
        paths = [str(folder / f"{name}.safetensors") for name in names]
        texts = []
        for clip in (
            comfy.sd.load_clip(paths, clip_type=comfy.sd.CLIPType.SD3),
            run(
                "LoadTextEncoder",
                type="sd3",
                file=f"{names[0]}.safetensors",
                file2=f"{names[1]}.safetensors",
                file3=f"{names[2]}.safetensors",
            ).args[0],
        ):
            texts.append(clip.encode_from_tokens(clip.tokenize(SHORT))[0])
        assert torch.equal(*texts)
        return texts[0]

    wanted = embed("l", "g", "t5")
    for quantized in plain:
        got = embed(*(f"{name}_small" if name == quantized else name for name in plain))
        for name, (tokens, columns) in PLACES.items():
            found = error(got[tokens, columns], wanted[tokens, columns])
            limit = 0.48 if name == "l" else 0.08
            right = 0 < found < limit if name == quantized else found == 0
            assert right, (name, found)
    assert torch.equal(
        embed("t5_small", "l_small", "g_small"), embed("l_small", "g_small", "t5_small")
    )


def test_a_type_that_only_names_a_combination_means_the_usual_kind(run, models, monkeypatch, comfy):
    save_file(clip_tensors(), models / "text_encoders" / "a.safetensors")
    seen = []
    real = comfy.sd.load_clip
    monkeypatch.setattr(
        comfy.sd, "load_clip", lambda *a, **k: seen.append(k["clip_type"]) or real(*a, **k)
    )
    run("LoadTextEncoder", file="a.safetensors", type="sdxl")  # as DualCLIPLoader does
    assert seen == [comfy.sd.CLIPType.STABLE_DIFFUSION]


def test_a_file_outside_the_list_is_refused(run, models):
    from fewbits.quant_ops.errors import CheckpointError

    with pytest.raises(CheckpointError, match="no such file"):
        run("LoadTextEncoder", file="../x.safetensors", type="sd3")
    with pytest.raises(CheckpointError, match="no such file"):
        run("LoadCheckpoint", file="x.safetensors")


def test_the_loaders_notice_a_changed_file(run, models):
    from fewbits.nodes.load import FewBitsLoadCheckpoint, FewBitsLoadTextEncoder

    paths = [models / "text_encoders" / name for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        path.write_bytes(b"1")
    state = FewBitsLoadTextEncoder.fingerprint_inputs(
        file="a.safetensors", file2="b.safetensors", file3="none"
    )
    paths[1].write_bytes(b"22")
    assert state != FewBitsLoadTextEncoder.fingerprint_inputs(
        file="a.safetensors", file2="b.safetensors", file3="none"
    )
    path = models / "checkpoints" / "c.safetensors"
    path.write_bytes(b"1")
    state = FewBitsLoadCheckpoint.fingerprint_inputs(file="c.safetensors")
    path.write_bytes(b"22")
    assert state != FewBitsLoadCheckpoint.fingerprint_inputs(
        file="c.safetensors", quantized_kernels=True
    )


def checkpoint(clip_format=None, model_format=None, vae=True):
    """SD3 with CLIP-L and a VAE in one file."""
    shapes = sd3_shapes() | {
        "context_embedder.weight": (128, 4096),
        "y_embedder.mlp.0.weight": (128, 2048),
    }
    model, clip = random_tensors(shapes), clip_tensors(3)
    if model_format:
        model = quantized(model, model_format, "x_block.mlp")
    if clip_format:
        clip = quantized(clip, clip_format)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in model.items()}
    tensors |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in clip.items()}
    if vae:
        from support.helpers import EMOJI

        taesd = load_file(EMOJI.with_name("emoji_vae.safetensors"))
        tensors |= {f"first_stage_model.{name}": tensor for name, tensor in taesd.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("clip_format", [None, "bnb_nf4", "float8_e4m3fn"])
@pytest.mark.parametrize("model_format", [None, "int8_blockwise", "int8_tensorwise"])
def test_a_checkpoint_gives_all_three_parts_whichever_is_quantized(
    run, models, encode, clip_format, model_format
):
    save_file(checkpoint(), models / "checkpoints" / "plain.safetensors")
    save_file(checkpoint(clip_format, model_format), models / "checkpoints" / "small.safetensors")
    _, plain, _, _ = run("LoadCheckpoint", file="plain.safetensors").args
    model, clip, vae, report = run("LoadCheckpoint", file="small.safetensors").args
    parts = {
        "model": (model.model, model_format, 4),
        "clip": (clip.cond_stage_model, clip_format, 18),
    }
    for part, format, count in parts.values():
        found = [
            module.quant_format
            for module in part.modules()
            if getattr(module, "quant_format", None)
        ]
        assert found == ([format] * count if format else [])
        assert (f"{count:>5} layers  {format}: " in report) == bool(format)
    assert vae.decode(torch.zeros(1, 16, 4, 4)).shape[-1] == 3
    assert error(encode(clip), encode(plain)) < (0.5 if clip_format else 1e-6)


def test_a_checkpoint_without_text_encoders_loads_without_them(run, models):
    tensors = {
        name: tensor
        for name, tensor in checkpoint().items()
        if not name.startswith("text_encoders")
    }
    save_file(tensors, models / "checkpoints" / "model.safetensors")
    model, clip, vae, _ = run(
        "LoadCheckpoint", file="model.safetensors", quantized_kernels=True
    ).args
    assert model is not None and clip is None and vae is not None


def test_the_clip_of_a_checkpoint_is_quantized_from_its_file(run, models, encode, comfy):
    save_file(checkpoint(), models / "checkpoints" / "plain.safetensors")
    _, clip, _, _ = run("LoadCheckpoint", file="plain.safetensors").args
    small, report = run("QuantizeTextEncoder", clip=clip, format="float8_e4m3fn").args
    rows = {row["name"]: row for row in json.loads(report)["layers"]}
    base = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    assert (
        rows[base]["dtype"] == "BF16" and rows[base]["format"] == "float8_e4m3fn"
    )  # in memory it is float16
    assert json.loads(report)["kernels"] == [
        "   18 layers  float8_e4m3fn: decoded, then multiplied at full precision"
    ]
    assert 0 < error(encode(small), encode(clip)) < 0.15


def test_load_model_says_how_layers_are_multiplied(run, models):
    tensors = quantized(random_tensors(flux_shapes()), "int8_blockwise", "_mlp.")
    save_file(tensors, models / "diffusion_models" / "flux.safetensors")
    _, report = run("LoadModel", file="flux.safetensors").args
    assert "how quantized layers are multiplied:\n    4 layers  int8_blockwise: " in report


def test_an_old_scaled_file_is_rewritten_with_its_codes(run, models, tmp_path):
    tensors = random_tensors(flux_shapes())
    old = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e5m2)}
    for name, tensor in tensors.items():
        inner = name.endswith("qkv.weight")
        base = name.removesuffix(".weight")
        old.update(
            dialects.scaled_fp8(base, tensor.float(), "float8_e5m2") if inner else {name: tensor}
        )
    save_file(
        {n: t.contiguous() for n, t in old.items()}, models / "diffusion_models" / "old.safetensors"
    )
    path, report = run("ConvertFP8Scaled", file="diffusion_models/old.safetensors").args
    assert path == str(tmp_path / "output" / "diffusion_models" / "old_comfy_quant.safetensors")
    new, data = load_file(path), json.loads(report)
    name = "double_blocks.0.img_attn.qkv"
    assert new[f"{name}.weight"].dtype == torch.float8_e5m2 and "scaled_fp8" not in new
    assert torch.equal(
        new[f"{name}.weight"].view(torch.uint8), old[f"{name}.weight"].view(torch.uint8)
    )
    assert bytes(new[f"{name}.comfy_quant"].tolist()).startswith(b'{"format": "float8_e5m2"')
    assert data["origins"] and {row["format"] for row in data["layers"]} == {"float8_e5m2", None}


def test_the_check_and_other_files_stop_a_conversion_before_it_writes(run, models, tmp_path):
    from fewbits.quant_ops.errors import QuantError

    folder = models / "diffusion_models"
    save_file(random_tensors(flux_shapes()), folder / "plain.safetensors")
    with pytest.raises(QuantError, match="not a scaled_fp8 file"):
        run("ConvertFP8Scaled", file="diffusion_models/plain.safetensors")
    state = dialects.scaled_fp8("layer", torch.randn(32, 32)) | {"scaled_fp8": torch.zeros(0)}
    save_file(state, folder / "old.safetensors")
    with pytest.raises(
        QuantError, match="1 of 1 layers that the filter matches are not high precision"
    ):
        run("ConvertFP8Scaled", file="diffusion_models/old.safetensors", high_precision="lay")
    assert not list((tmp_path / "output").rglob("*.safetensors"))
