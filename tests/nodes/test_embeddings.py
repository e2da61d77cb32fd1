"""Quantized embedding tables: read by ComfyUI where it can, by us where it cannot, refused where nobody could."""

import pytest
import torch

from support import dialects

N, K = 40, 256
READ = {"float8_e4m3fn": {}, "float8_e5m2": {}, "int8_tensorwise": {}, "one scale": {"scaling": "tensor"},
        "convrot": {"convrot": True, "convrot_groupsize": 256}}  # fmt: skip


@pytest.fixture
def weight():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def old(comfy, dtype):
    """Embedding as it is where ComfyUI has no quantized one (<= 0.20), with our mixin."""
    from fewbits.nodes.bridge.seams.layers import OwnEmbedding

    core = comfy.ops.manual_cast.Embedding
    return type("Embedding", (OwnEmbedding, core), {"_fewbits_core": core, "_fewbits_dtype": dtype})


@pytest.fixture(autouse=True)
def ask_again(comfy, monkeypatch):
    """What ComfyUI reads is asked once per process; the old class and the real one answer differently."""
    from fewbits.nodes.bridge import compat

    monkeypatch.setattr(compat, "_EMBEDDING", {})


def stored(case, weight):
    format = case if case.startswith("float8") else "int8_tensorwise"
    tensors, marker = dialects.native(format, weight, **READ[case])
    return dialects.under("table", tensors, marker), decoded(format, tensors, READ[case])


def decoded(name, tensors, options):
    from fewbits.quant_ops.formats import get_format
    from fewbits.quant_ops.spec import LayerInput

    format = get_format(name)
    return format.dequantize(tensors, LayerInput((N, K), None), format.configure(options))


def load(cls, state, dtype):
    table = torch.nn.ModuleDict({"table": cls(N, K, device="cpu", dtype=dtype)})
    missing, unexpected = table.load_state_dict(dict(state), strict=False)
    return table["table"], missing, unexpected


IDS = torch.tensor([[0, 7, 7], [39, 1, 0]])


@pytest.mark.parametrize("case", READ)
def test_an_old_comfyui_looks_up_the_decoded_rows(old, weight, dtype, case):
    state, wanted = stored(case, weight)
    table, missing, unexpected = load(old, state, dtype)
    assert missing == unexpected == []
    for out in (torch.float32, torch.float16, None):
        got = table(IDS, out_dtype=out)
        assert got.dtype == (out or dtype) and got.shape == (2, 3, K)
        assert torch.equal(got, wanted[IDS].to(got.dtype))


@pytest.mark.parametrize("case", READ)
def test_only_the_rows_that_are_looked_up_are_decoded(old, weight, dtype, case, monkeypatch):
    table, _, _ = load(old, stored(case, weight)[0], dtype)
    monkeypatch.setattr(
        type(table.weight), "dequantize", lambda self: pytest.fail("the whole table was decoded")
    )
    table(IDS, out_dtype=torch.float32)


@pytest.mark.parametrize("case", READ)
def test_it_is_saved_as_it_was(old, weight, dtype, case):
    state, _ = stored(case, weight)
    table, _, _ = load(old, state, dtype)
    saved = table.state_dict(prefix="table.")
    assert set(saved) == set(state)
    for name, tensor in state.items():
        assert saved[name].dtype == tensor.dtype
        assert saved[name] is saved["table.comfy_quant"] or torch.equal(
            saved[name].float(), tensor.float()
        ), name
    assert bytes(saved["table.comfy_quant"].tolist()) == bytes(state["table.comfy_quant"].tolist())


@pytest.mark.parametrize("case", ["float8_e4m3fn", "int8_tensorwise"])
def test_a_lora_on_the_table_is_rounded_once_and_can_be_taken_off(comfy, old, weight, dtype, case):
    state, wanted = stored(case, weight)
    patched_and_taken_off(load(old, state, dtype)[0], wanted)


@pytest.mark.parametrize("case", READ)
def test_a_lora_on_a_table_that_comfyui_reads_itself_has_its_effect(comfy, weight, case):
    """Its own Embedding adds the patch to a decoded copy, and nothing comes of it."""
    state, wanted = stored(case, weight)
    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    table, _, _ = load(ops.Embedding, state, torch.float32)
    before = table.state_dict()
    patched_and_taken_off(table, wanted, limit=0.12 if case == "float8_e5m2" else 0.05)
    after = table.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name].float(), before[name].float()) for name in before)


def patched_and_taken_off(table, wanted, limit=0.05):
    import comfy.model_patcher

    before = table(IDS, out_dtype=torch.float32)
    model = torch.nn.ModuleDict({"table": table})
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    delta = torch.randn(N, K, generator=torch.Generator().manual_seed(3)) * 0.1
    patcher.add_patches({"table.weight": ("diff", (delta,))})
    patcher.patch_model()
    got = table(IDS, out_dtype=torch.float32)
    error = (got - (wanted + delta)[IDS]).norm() / got.norm()
    assert error < limit
    assert float((got - wanted[IDS]).norm() / got.norm()) > 0.08
    patcher.unpatch_model()
    assert torch.equal(table(IDS, out_dtype=torch.float32), before)


def test_a_plain_table_is_comfyuis_own(comfy, old, weight, dtype):
    from comfy.model_patcher import get_key_weight

    table, missing, _ = load(old, {"table.weight": weight}, dtype)
    assert missing == []
    assert torch.equal(table(IDS, out_dtype=torch.float32), weight[IDS].to(dtype).float())
    assert get_key_weight(torch.nn.ModuleDict({"table": table}), "table.weight")[1:] == (None, None)


@pytest.mark.parametrize("case", READ)
def test_this_comfyui_reads_the_table_whoever_does_it(comfy, weight, case):
    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    state, wanted = stored(case, weight)
    table, _, unexpected = load(ops.Embedding, state, torch.float32)
    assert unexpected == []
    torch.testing.assert_close(
        table(IDS, out_dtype=torch.float32), wanted[IDS], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["bnb_nf4", "int8_blockwise", "float8_e4m3fn_rowwise", "nvfp4", "mxfp8"]
)
def test_other_formats_are_refused_by_name(comfy, weight, name):
    from fewbits.quant_ops.errors import UnsupportedLayerError

    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    state = dialects.under("table", *dialects.native(name, torch.randn(256, 256)))
    with pytest.raises(
        UnsupportedLayerError, match=f"layer 'table': {name} is not supported for Embedding layers"
    ):
        load(ops.Embedding, state, torch.float32)
