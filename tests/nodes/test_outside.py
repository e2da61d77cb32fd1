"""What lies outside the diffusion model, and what ComfyUI cuts or renames while loading: nothing is lost, and the MODEL
says the same as its file."""

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.helpers import fewbits, random_tensors

pytestmark = pytest.mark.slow  # whole models of ComfyUI's classes

AUDIO = {"global_cond_dim": 1536, "project_cond_tokens": False, "num_heads": 2, "depth": 2, "embed_dim": 128,
         "cond_token_dim": 768}  # fmt: skip
UNET = {"image_size": 32, "use_spatial_transformer": True, "legacy": False, "out_channels": 4, "model_channels": 320,
        "num_res_blocks": [1, 1], "channel_mult": [1, 1], "num_heads": 8, "transformer_depth": [1, 0],
        "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 0, 0], "context_dim": 768}  # fmt: skip
CASCADE = {"c_cond": 64, "c_hidden": [64, 64], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]], "c_clip_text": 64,
           "c_clip_text_pooled": 64, "c_clip_img": 64}  # fmt: skip
PIXEL = {"num_groups": 2, "hidden_size": 64, "pixel_attn_hidden_size": 64, "patch_depth": 1, "pixel_depth": 1,
         "txt_embed_dim": 64, "txt_max_length": 8}  # fmt: skip
HYDIT = {"hidden_size": 64, "depth": 2, "num_heads": 2, "text_states_dim": 1024}
# kind -> (ComfyUI's class, its arguments, what detection says; None: detected as it is)
CUT = {
    "Stable Cascade": ("ldm.cascade.stage_c:StageC", CASCADE, {"stable_cascade_stage": "c", **CASCADE}),
    "PixelDiT": ("ldm.pixeldit.model:PixDiT_T2I", PIXEL, {"image_model": "pixeldit_t2i", **PIXEL}),
    "HunyuanDiT": ("ldm.hydit.models:HunYuanDiT", HYDIT, {"image_model": "hydit", **HYDIT}),
}  # fmt: skip
MARKER = ".adaLN_modulation.0."


def state_of(where, **config):
    """Random bf16 weights of one of ComfyUI's diffusion models."""
    import comfy.ops

    module, _, name = where.partition(":")
    cls = getattr(importlib.import_module(f"comfy.{module}"), name)
    ops = comfy.ops.disable_weight_init
    with torch.device("meta"):
        made = cls(**config, dtype=torch.bfloat16, device="meta", operations=ops)
    return random_tensors({name: tuple(t.shape) for name, t in made.state_dict().items()})


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def stable_audio():
    from comfy.ldm.audio.embedders import NumberConditioner

    dit = state_of("ldm.audio.dit:AudioDiffusionTransformer", **AUDIO)
    tensors = prefixed("model.model.", dit)
    conditioner = NumberConditioner(768, min_val=0, max_val=512).state_dict()
    for name in ("seconds_start", "seconds_total"):
        shapes = {key: tuple(value.shape) for key, value in conditioner.items()}
        values = random_tensors(shapes, torch.float32)
        tensors |= prefixed(f"conditioner.conditioners.{name}.", values)
    return tensors


def unet(**config):
    where = "ldm.modules.diffusionmodules.openaimodel:UNetModel"
    return prefixed("model.diffusion_model.", state_of(where, **{**UNET, **config}))


def zero123():
    outside = {"cc_projection.weight": torch.randn(768, 772) * 0.03}
    return {**unet(in_channels=8), **outside, "cc_projection.bias": torch.randn(768)}


CHECKPOINTS = {
    "Stable Audio": (stable_audio, "StableAudio1", "conditioner.conditioners."),
    "Stable Zero123": (zero123, "Stable_Zero123", "cc_projection."),
}


@pytest.fixture
def checkpoint(comfy, tmp_path):
    """Tensors -> the MODEL of a checkpoint that holds them."""

    def load(tensors):
        path = tmp_path / "checkpoint.safetensors"
        save_file(tensors, path)
        return comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, output_clip=False
        )[0]

    return load


def around(model):
    """The weights of a MODEL beside those of its diffusion model."""
    state = model.model.state_dict()
    inside = ("diffusion_model.", "model_sampling.")
    return {name: tensor for name, tensor in state.items() if not name.startswith(inside)}


def equal(one, other):
    return set(one) == set(other) and all(
        torch.equal(tensor.float(), other[name].float()) for name, tensor in one.items()
    )


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_quantized_model_keeps_its_class_and_the_weights_around_it(checkpoint, quantize, kind):
    make, name, _ = CHECKPOINTS[kind]
    model = checkpoint(make())
    quantized, report = quantize(model, "float8_e4m3fn", preset="none")
    assert {layer.format for layer in report.plan.layers} == {"float8_e4m3fn", None}
    assert type(quantized.model).__name__ == type(model.model).__name__ == name
    assert around(model) and equal(around(quantized), around(model))


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("known_file", [True, False], ids=["from its file", "from memory"])
def test_a_saved_model_opens_as_itself_in_the_stock_loader(
    comfy, checkpoint, quantize, save, tmp_path, kind, known_file
):
    make, name, outside = CHECKPOINTS[kind]
    model = checkpoint(make())
    wanted = around(model)
    if not known_file:
        model.cached_patcher_init = None
    path = tmp_path / "saved.safetensors"
    save(quantize(model, "float8_e4m3fn", preset="none")[0], path)
    saved = load_file(path)
    assert {key for key in saved if key.startswith(outside)}
    assert not [key for key in saved if key.startswith(outside) and key.endswith("comfy_quant")]
    again = comfy.sd.load_diffusion_model(str(path))
    assert type(again.model).__name__ == name and equal(around(again), wanted)
    layers = [m for m in again.model.diffusion_model.modules() if getattr(m, "quant_format", None)]
    assert layers


def test_text_encoder_and_vae_of_a_checkpoint_stay_outside(checkpoint, comfy):
    from fewbits.nodes.bridge.model_io import ModelSource

    extra = {"first_stage_model.decoder.conv_in.weight": torch.zeros(4, 16, 3, 3),
             "cond_stage_model.model.visual.proj": torch.zeros(4, 4), "alphas_cumprod": torch.zeros(3)}  # fmt: skip
    with ModelSource(checkpoint({**zero123(), **extra})) as source:
        offered = set(source.header.tensors)
    assert not offered & set(extra)
    assert {"cc_projection.weight", "cc_projection.bias"} <= offered


def sdxl_traits():
    """What the tensors beside an SDXL model say: names -> what ComfyUI reads off them."""
    scalar = torch.tensor
    return {
        "v prediction": {"v_pred": torch.zeros(0)},
        "zero terminal SNR": {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
        "EDM": {"edm_vpred.sigma_max": scalar(120.0), "edm_vpred.sigma_min": scalar(0.01)},
        "Playground": {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
    }


@pytest.mark.parametrize("kind", sdxl_traits())
def test_tensors_that_only_say_how_a_checkpoint_samples_are_found(comfy, kind):
    import comfy.supported_models

    from fewbits.nodes.bridge.origin import read_outside
    from fewbits.quant_ops.sources import MemorySource

    told = sdxl_traits()[kind]
    others = {
        "model.diffusion_model.a.weight": torch.zeros(1),
        "first_stage_model.b": torch.zeros(1),
    }
    config = comfy.supported_models.SDXL(
        {**comfy.supported_models.SDXL.unet_config, "in_channels": 4}
    )
    found = read_outside(config, MemorySource({**others, **told}), "model.diffusion_model.")
    assert set(found.names) == set(told)
    assert found.model.model_type == config.model_type(told)


def test_every_model_config_says_what_it_reads_beside_the_diffusion_model(comfy):
    """A class that cannot be built without its diffusion model would hide what it reads.

    Zero123 is one; its `required_keys` name all that it reads.
    """
    import comfy.supported_models

    from fewbits.nodes.bridge.origin import read_outside
    from fewbits.quant_ops.sources import MemorySource

    conditioners = {key: value for key, value in stable_audio().items() if key.startswith("cond")}
    required = {
        "cc_projection.weight": torch.zeros(768, 772),
        "cc_projection.bias": torch.zeros(768),
    }
    widths = {"in_channels": 4, "timestep_features_type": "learned", "hidden_size": 64, "dim": 64}
    silent = []
    for cls in comfy.supported_models.models:
        config = cls({**widths, **cls.unet_config})
        blocks = {key.format(""): torch.zeros(1) for key in cls.required_keys}
        told = MemorySource({**blocks, **conditioners, **required})
        if read_outside(config, told, "").model is None:
            silent.append(cls.__name__)
    assert silent == ["Stable_Zero123"]


@pytest.fixture
def cut(comfy, tmp_path, monkeypatch):
    """A file of a small model of a kind whose tensors ComfyUI cuts or renames; and its MODEL."""

    def make(kind):
        import comfy.model_detection

        where, config, detected = CUT[kind]
        tensors = fused(kind, state_of(where, **config))
        path = tmp_path / "cut.safetensors"
        save_file(tensors, path)
        monkeypatch.setattr(
            comfy.model_detection, "detect_unet_config", lambda *args, **kwargs: dict(detected)
        )
        return path, tensors, comfy.sd.load_diffusion_model(str(path))

    return make


def fused(kind, tensors):
    """The tensors as they are published: what ComfyUI cuts is whole."""
    if kind == "Stable Cascade":
        return {**_joined(tensors, "to_q", "to_k", "to_v")}
    if kind == "PixelDiT":
        return _interleaved(tensors)
    return tensors


def _joined(tensors, *parts):
    out = dict(tensors)
    for name in tensors:
        base, _, rest = name.partition(f".{parts[0]}.")
        if rest:
            pieces = [out.pop(f"{base}.{part}.{rest}") for part in parts]
            out[f"{base}.in_proj_{rest}"] = torch.cat(pieces)
    return out


def _interleaved(tensors):
    out, pixel = dict(tensors), tensors["pixel_embedder.proj.weight"].shape[0]
    for name in tensors:
        base, _, rest = name.partition(".adaLN_modulation_msa.")
        if rest:
            msa, mlp = (
                out.pop(f"{base}.adaLN_modulation_{part}.{rest}") for part in ("msa", "mlp")
            )
            trail = msa.shape[1:]
            halves = [half.reshape(-1, 3, pixel, *trail) for half in (msa, mlp)]
            out[f"{base}{MARKER}{rest}"] = torch.cat(halves, 1).reshape(-1, *trail)
    return out


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", CUT)
def test_what_comfyui_cuts_while_loading_is_offered_as_the_file_has_it(cut, kind):
    from fewbits.nodes.bridge.model_io import ModelSource

    _, tensors, model = cut(kind)
    with ModelSource(model) as source:
        assert set(source.header.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(bits(source.read(name)), bits(tensor)), name


@pytest.mark.parametrize("kind", CUT)
def test_node_and_command_write_the_same_bytes(cut, quantize, save, tmp_path, kind):
    path, _, model = cut(kind)
    save(quantize(model, "int8_tensorwise")[0], tmp_path / "node.safetensors")
    command = tmp_path / "command.safetensors"
    result = fewbits("quantize", path, "-o", command, "--format", "int8_tensorwise")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "node.safetensors").read_bytes() == command.read_bytes()


@pytest.mark.parametrize("kind", ["Stable Cascade", "PixelDiT"])
def test_a_patch_on_one_part_of_a_cut_tensor_is_not_lost(cut, kind):
    from fewbits.nodes.bridge.model_io import ModelSource

    _, tensors, model = cut(kind)
    state = model.model.diffusion_model.state_dict()
    name = next(key for key in state if key.endswith(("to_k.weight", "_modulation_mlp.weight")))
    delta = torch.ones(state[name].shape)
    model.add_patches({f"diffusion_model.{name}": ("diff", (delta,))})
    with ModelSource(model) as source:
        assert torch.equal(source.read(name), state[name].float() + 1)
        whole = name.replace("to_k.", "in_proj_").replace("_modulation_mlp.", "_modulation.0.")
        assert whole in tensors and whole not in source.header.tensors


def test_a_part_that_somebody_changed_in_place_counts_more_than_the_file(cut):
    from fewbits.nodes.bridge.model_io import ModelSource

    _, _, model = cut("Stable Cascade")
    state = model.model.diffusion_model.state_dict()
    name = next(key for key in state if key.endswith("to_k.weight"))
    state[name].mul_(3)
    with ModelSource(model) as source:
        assert torch.equal(source.read(name).float(), state[name].float())
        assert name.replace("to_k.", "in_proj_") not in source.header.tensors


def test_a_model_that_comfyui_would_take_for_another_is_refused(checkpoint, comfy, quantize):
    from fewbits.quant_ops.errors import UnsupportedLayerError

    model = checkpoint(zero123())
    model.model.__class__ = type("Changed", (type(model.model),), {})
    with pytest.raises(UnsupportedLayerError, match="Stable_Zero123 instead of Changed"):
        quantize(model, "float8_e4m3fn", preset="none")
