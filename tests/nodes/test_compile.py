"""torch.compile of a whole quantized block: one graph, the same numbers."""

import pytest
import torch

from fewbits.quant_ops.formats import FORMATS
from support.helpers import EMOJI

pytestmark = pytest.mark.slow  # two seconds of tracing each


@pytest.fixture
def counters():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


# comfy-kitchen 0.2.26 cannot trace its convrot_w4a4: a cached Hadamard matrix is no fake tensor.
WISHES = [*(name for name in FORMATS if name != "convrot_w4a4"), "int8_tensorwise:convrot=true"]
# In bf16 as on a GPU; two in float32 as well, one of ComfyUI's own and one of ours: what is traced is the same.
CASES = [(wish, torch.bfloat16) for wish in WISHES]
CASES += [(wish, torch.float32) for wish in ("float8_e4m3fn", "int8_blockwise")]


@pytest.fixture
def block(comfy, quantize, monkeypatch):
    """`block(wish)` -> a block of the emoji model, and `arguments(tokens, dtype)` to call it with."""
    import comfy.ldm.flux.math
    from comfy.ldm.modules.attention import attention_pytorch

    # ComfyUI's attention for the CPU reads /proc/meminfo; this is the one that GPUs use.
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention_pytorch)

    def quantized(wish):
        model, _ = quantize(comfy.sd.load_diffusion_model(str(EMOJI)), wish)
        flux = model.model.diffusion_model

        def arguments(tokens, dtype):
            generator = torch.Generator().manual_seed(1)
            shapes = (1, tokens, 256), (1, 256)
            x, vec = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
            pe = flux.pe_embedder(torch.zeros(1, tokens, 3))
            return tuple(tensor.clone() for tensor in (x, vec, pe))

        return flux.single_blocks[0], arguments

    return quantized


@pytest.mark.parametrize(("wish", "dtype"), CASES, ids=str)
def test_a_quantized_block_compiles_to_one_graph(block, counters, wish, dtype):
    module, arguments = block(wish)
    assert module.linear1.quant_format == wish.partition(":")[0]
    with torch.inference_mode(False), torch.no_grad():
        wanted = module(*arguments(24, dtype))
        got = torch.compile(module, backend="aot_eager")(*arguments(24, dtype))
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(
        got, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2
    )


@pytest.mark.parametrize("wish", ["float8_e4m3fn", "int8_tensorwise:convrot=true", "bnb_nf4"])
def test_pictures_of_other_sizes_need_one_graph_more_for_all(block, counters, wish):
    module, arguments = block(wish)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.inference_mode(False), torch.no_grad():
        for tokens in (24, 96, 54, 200):
            wanted = module(*arguments(tokens, torch.bfloat16))
            got = compiled(*arguments(tokens, torch.bfloat16))
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-2)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] <= 2


NATIVE = ["int8_tensorwise", "int8_tensorwise:convrot=true", "float8_e4m3fn", "nvfp4", "mxfp8"]


@pytest.mark.parametrize("wish", NATIVE)
def test_where_we_multiply_a_native_layer_a_compiler_follows_our_op(
    block, counters, wish, monkeypatch
):
    """As on a GPU that the table knows; here the op's eager body multiplies."""
    from fewbits.nodes.bridge.seams import layers
    from fewbits.quant_ops.layouts import product

    module, arguments = block(wish)
    monkeypatch.setattr(layers.OwnLinear, "_fewbits_is_ours", lambda layer, x: layer.layout_type)
    multiplied, multiply = [], product.multiply_at
    monkeypatch.setattr(
        product, "multiply_at", lambda *args: multiplied.append(args[2]) or multiply(*args)
    )
    layers_here = [layer for layer in module.modules() if getattr(layer, "layout_type", None)]
    compiled = torch.compile(module, backend="aot_eager")
    with torch.inference_mode(False), torch.no_grad():
        for tokens in (24, 96, 54):
            wanted = module(*arguments(tokens, torch.float32))
            multiplied.clear()
            got = compiled(*arguments(tokens, torch.float32))
            assert len(multiplied) == len(layers_here) > 1
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("wish", ["bnb_nf4", "int8_tensorwise"])
def test_a_compiled_block_asks_no_weight_what_it_is_made_of(block, wish, monkeypatch):
    from comfy_kitchen.tensor import QuantizedTensor

    from fewbits.nodes.bridge.seams import layers

    module, arguments = block(wish)
    monkeypatch.setattr(layers.OwnLinear, "_fewbits_is_ours", lambda layer, x: layer.layout_type)
    asked, flatten = [], QuantizedTensor.__tensor_flatten__
    compiled = torch.compile(module, backend="aot_eager")
    with torch.inference_mode(False), torch.no_grad():
        compiled(*arguments(24, torch.bfloat16))
        monkeypatch.setattr(
            QuantizedTensor, "__tensor_flatten__", lambda w: asked.append(w) or flatten(w)
        )
        compiled(*arguments(24, torch.bfloat16))
        assert asked == []


@pytest.mark.parametrize("wish", ["bnb_nf4", "int8_tensorwise"])
def test_a_compiled_block_follows_its_weights(block, counters, wish):
    """New ones, and what is written into those that it has."""
    module, arguments = block(wish)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.inference_mode(False), torch.no_grad():

        def agrees(block, compiled):
            wanted = block(*arguments(24, torch.bfloat16))
            got = compiled(*arguments(24, torch.bfloat16))
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-2)
            return wanted

        first = agrees(module, compiled)
        weight = module.linear1.weight
        module.linear1.set_weight(-weight.dequantize())
        second = agrees(module, compiled)
        assert not torch.allclose(first, second, rtol=2e-2, atol=1e-2)
        module.linear1.weight.copy_(weight)  # into the memory that it has
        torch.testing.assert_close(agrees(module, compiled), first)
        module.to(torch.device("cpu"))
        torch.testing.assert_close(agrees(module, compiled), first)


@pytest.mark.parametrize("wish", ["bnb_nf4", "int8_tensorwise"])
def test_a_lora_beside_a_product_is_compiled_with_it(block, counters, wish):
    from fewbits.nodes.bridge.seams.low_rank import LowRank

    module, arguments = block(wish)
    layer = module.linear1
    generator = torch.Generator().manual_seed(2)
    shapes = (4, layer.in_features), (layer.out_features, 4)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.inference_mode(False), torch.no_grad():
        plain = module(*arguments(24, torch.float32))
        layer._fewbits_low_rank = LowRank(
            *(torch.randn(shape, generator=generator) / 16 for shape in shapes)
        )
        for tokens in (24, 96, 54):
            wanted = module(*arguments(tokens, torch.float32))
            got = compiled(*arguments(tokens, torch.float32))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)
        assert not torch.allclose(module(*arguments(24, torch.float32)), plain, atol=1e-2)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] <= 2
