"""Where ComfyUI looks for a model: what it would not find is refused or labelled, never called stock."""

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops.doors import inspect_file, quantize_file, verify_file
from fewbits.quant_ops.errors import SourceError
from fewbits.quant_ops.planning.model_family import families
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import dialects
from support.helpers import flux_shapes, random_tensors

INT8 = Recipe(parse_wish("int8"))
HOME = "model.diffusion_model."
UNKNOWN = ", if ComfyUI knows this model: FewBits does not recognise it"


@pytest.fixture
def write(tmp_path):
    def run(tensors, name="in"):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
        return path

    return run


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def flux(prefix=""):
    return {f"{prefix}{name}": tensor for name, tensor in random_tensors(flux_shapes()).items()}


def moved(tensors, chosen, prefix):
    """The tensors with those whose name has `chosen` moved under another prefix."""
    bare = {name: name.removeprefix(HOME) for name in tensors}
    return {
        (prefix + bare[name] if chosen in name else name): tensor
        for name, tensor in tensors.items()
    }


MIXED = {
    "some without the prefix": moved(flux(HOME), "txt_mlp.", ""),
    "some with the prefix": moved(flux(), "txt_mlp.", HOME),
    "two prefixes": moved(flux(HOME), "txt_mlp.", "net."),
}
ELSEWHERE = {
    "a prefix of other tools": flux("transformer."),
    "a doubled prefix": flux(HOME * 2),
    "a wrapper's prefix": flux("module."),
    "a compiled model's prefix": flux(HOME + "_orig_mod."),
    "only averaged weights": {**flux("ema."), "step": torch.zeros(1)},
    "two models in one file": flux("high.") | flux("low."),
}


@pytest.mark.parametrize("case", MIXED)
def test_a_model_under_two_prefixes_is_refused(case, write, out):
    with pytest.raises(SourceError, match="Flux.*lies under two prefixes.*ComfyUI reads one"):
        quantize_file(write(MIXED[case]), out, INT8)
    assert not out.exists()


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_model_under_a_prefix_that_comfyui_leaves_is_refused(case, write, out):
    with pytest.raises(SourceError, match="begin with '.*', which ComfyUI does not take away"):
        quantize_file(write(ELSEWHERE[case]), out, INT8)
    assert not out.exists()


@pytest.mark.parametrize("case", {**MIXED, **ELSEWHERE})
def test_quantized_layers_under_such_names_are_a_problem(case, write):
    tensors = {**MIXED, **ELSEWHERE}[case]
    weight = next(name for name in tensors if name.endswith("img_attn.qkv.weight"))
    made = dialects.native("int8_tensorwise", tensors[weight].float())
    path = write({**tensors, **dialects.under(weight.removesuffix(".weight"), *made)})
    inspection, found = inspect_file(path), verify_file(path)
    assert [finding.name for finding in found.findings] == ["names-misplaced"]
    assert len(inspection.findings) == 1 and "see the problems" in inspection.loads_in


@pytest.mark.parametrize("prefix", ["", HOME, "model.", "net.", "model.model."])
def test_a_model_under_a_prefix_that_comfyui_reads_is_labelled_without_reserve(prefix, write, out):
    report = quantize_file(write(flux(prefix)), out, INT8)
    assert report.plan.loads_in() == "loads in stock ComfyUI >= 0.27.0"
    assert inspect_file(out).loads_in == report.plan.loads_in() and verify_file(out).ok


def test_what_is_not_recognised_is_labelled_so(write, out):
    """Three tensors, and a known model of so few that ComfyUI does not take its prefix."""
    wide = torch.randn(64, 256)
    few = [name for name in flux(HOME) if "single_blocks.0.linear" in name or "img_in" in name]
    for tensors in (
        {f"blocks.{index}.mlp.weight": wide for index in range(3)},
        {name: flux(HOME)[name] for name in few[:4]},
    ):
        report = quantize_file(write(tensors), out, INT8, overwrite=True)
        assert report.plan.loads_in() == "loads in stock ComfyUI >= 0.27.0" + UNKNOWN
        assert inspect_file(out).loads_in == report.plan.loads_in()


def test_a_checkpoint_with_a_vae_is_quantized_and_has_no_problem(write, out):
    """Its VAE was taken for a place of quantized layers, and the finished file was thrown away."""
    vae = {
        f"vae.{side}.conv_in.weight": torch.randn(32, 16, 3, 3) for side in ("encoder", "decoder")
    }
    report = quantize_file(write({**flux(HOME), **vae}), out, INT8)
    assert report.plan.loads_in() == "loads in stock ComfyUI >= 0.27.0"
    assert verify_file(out).ok and inspect_file(out).findings == ()


VAES = [family for family in families() if family.name == "vae"]


@pytest.mark.parametrize("family", VAES, ids=lambda family: family.keys[0])
def test_a_bare_vae_is_refused_by_name_whatever_its_kind(family, write, out):
    tensors = {key: torch.randn(64, 64) for key in family.keys}
    path = write({**tensors, "decoder.mid.attn.to_q.weight": torch.randn(64, 64)})
    with pytest.raises(SourceError, match="this is a VAE file"):
        quantize_file(path, out, INT8)
    assert inspect_file(path).family == "VAE" and not out.exists()
    assert inspect_file(path).loads_in == "loads in stock ComfyUI (nothing is quantized)"


GEMMA = {
    f"model.layers.0.{name}.weight": torch.ones(64, 64)
    for name in ("self_attn.k_proj", "mlp.gate_proj", "post_feedforward_layernorm")
}


@pytest.mark.parametrize("prefix", ["language_model.", "thinker.", "text_encoder."])
def test_a_text_encoder_under_a_prefix_of_other_tools_is_refused_and_never_called_stock(
    prefix, write, out
):
    path = write({prefix + name: tensor for name, tensor in GEMMA.items()})
    with pytest.raises(SourceError, match=f"Gemma encoder begin with '{prefix}'.*without a prefix"):
        quantize_file(path, out, INT8)
    assert inspect_file(path).loads_in.endswith(UNKNOWN)


@pytest.mark.parametrize(
    "prefix",
    ["", "transformer.", "text_encoders.gemma2_2b.transformer.", "gemma.transformer.inner."],
)
def test_a_text_encoder_in_its_place_is_quantized(prefix, write, out):
    path = write({prefix + name: tensor for name, tensor in GEMMA.items()})
    assert any(layer.format for layer in quantize_file(path, out, INT8).plan.layers)
