"""Banks of experts (3-D): ComfyUI's own formats pass through untouched, ours are refused by name, plain ones stay."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.checkpoint.verify import verify_source
from fewbits.quant_ops.doors import inspect_file, quantize_file
from fewbits.quant_ops.errors import CheckpointError, UnsupportedLayerError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.sources import MemorySource
from support import dialects

BANK = "layers.0.mlp.experts.gate_up_proj"
EXPERTS, N, K = 3, 64, 128


@pytest.fixture
def ops(comfy):
    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    if not hasattr(ops, "MoEExperts"):
        pytest.skip("this ComfyUI has no expert banks (0.23 on)")
    return ops


@pytest.fixture
def weights():
    return torch.randn(EXPERTS, N, K, generator=torch.Generator().manual_seed(3))


def stacked(name, weights):
    """The experts one by one in a format, and their tensors stacked, as ComfyUI stores a bank."""
    parts = [dialects.native(name, weight) for weight in weights]
    tensors = {
        suffix: torch.stack([tensors[suffix] for tensors, _ in parts]) for suffix in parts[0][0]
    }
    return dialects.under(BANK, tensors, {"format": name, "num_experts": len(weights)})


def loaded(ops, state):
    bank = ops.MoEExperts(EXPERTS, K, N, bias=False, device="cpu")
    bank.load_state_dict({name.removeprefix(f"{BANK}."): tensor for name, tensor in state.items()})
    return bank


NATIVE = ["float8_e4m3fn", "int8_tensorwise", "nvfp4", "mxfp8"]


@pytest.mark.parametrize("name", NATIVE)
def test_comfyuis_own_formats_load_and_multiply_as_without_the_pack(ops, weights, name):
    bank = loaded(ops, stacked(name, weights))
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(4))
    for i, weight in enumerate(weights):
        wanted = x @ weight.T
        error = float((bank.expert_linear(x, i) - wanted).norm() / wanted.norm())
        assert error < (0.2 if name == "nvfp4" else 0.06)


@pytest.mark.parametrize("name", NATIVE)
def test_a_bank_in_a_file_is_copied_while_other_layers_are_quantized(ops, weights, name, tmp_path):
    state = stacked(name, weights)
    source, target = tmp_path / "moe.safetensors", tmp_path / "small.safetensors"
    save_file({**state, "layers.0.self_attn.q_proj.weight": weights[0].bfloat16()}, source)
    assert inspect_file(source).findings == () and inspect_file(source).formats == {name: 1}
    report = quantize_file(source, target, Recipe(parse_wish("bnb_nf4"), preset="none"))
    rows = {layer.name: layer for layer in report.plan.layers}
    assert rows[BANK].reason == f"bank of experts, quantized already ({name}): copied"
    assert rows["layers.0.self_attn.q_proj"].format == "bnb_nf4" and report.plan.min_comfyui in (
        "0.23.0",
        "0.27.0",
    )
    written = load_file(target)
    for key, tensor in state.items():
        assert torch.equal(written[key].view(torch.uint8), tensor.view(torch.uint8)), key
    again = {key: tensor for key, tensor in written.items() if key.startswith(BANK)}
    assert torch.equal(
        loaded(ops, again).expert_weight(1).dequantize(),
        loaded(ops, state).expert_weight(1).dequantize(),
    )


@pytest.mark.parametrize("name", NATIVE)
def test_verify_says_that_a_bank_was_not_decoded_and_finds_nothing_wrong(weights, name):
    checked = verify_source(MemorySource(stacked(name, weights)))
    assert checked.ok and [(layer.dialect, layer.format) for layer in checked.layers] == [
        ("bank of experts, not decoded", name)
    ]


def in_our_format(weights, name):
    state = stacked("float8_e4m3fn", weights)
    return state | dialects.under(BANK, {}, {"format": name, "num_experts": EXPERTS})


@pytest.mark.parametrize("name", ["int8_blockwise", "bnb_nf4"])
def test_a_bank_in_our_formats_is_refused_by_name(ops, weights, name):
    model = torch.nn.ModuleDict({"bank": ops.MoEExperts(EXPERTS, K, N, bias=False, device="cpu")})
    state = {
        key.replace(BANK, "bank"): tensor for key, tensor in in_our_format(weights, name).items()
    }
    with pytest.raises(
        UnsupportedLayerError,
        match=f"layer 'bank': {name} is not supported for MoEExperts layers; keep",
    ):
        model.load_state_dict(state, strict=False)


def test_the_command_refuses_such_a_file_too(weights, tmp_path):
    save_file(in_our_format(weights, "int8_blockwise"), tmp_path / "moe.safetensors")
    with pytest.raises(
        CheckpointError,
        match=f"layer '{BANK}' is a bank of experts in 'int8_blockwise', which ComfyUI",
    ):
        quantize_file(
            tmp_path / "moe.safetensors", tmp_path / "x.safetensors", Recipe(parse_wish("bnb_nf4"))
        )
    assert not (tmp_path / "x.safetensors").exists()
