"""Plans: which rule decides, in which words, and how many bytes come out."""

import json

import pytest
import torch

from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.pipeline import plan_source, quantize
from fewbits.quant_ops.planning.model_family import families, find_parts, load_preset, preset_names
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, Rule, parse_wish
from fewbits.quant_ops.sources import MemorySink, MemorySource
from fewbits.quant_ops.spec import Header, TensorSpec
from support.helpers import flux_shapes, random_tensors, sd3_shapes

INT8 = Recipe(primary=parse_wish("int8_tensorwise"))
T5 = {
    "shared.weight": (320, 64),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    "encoder.block.0.layer.0.layer_norm.weight": (64,),
    "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 64),
}
CLIP = {
    "text_model.embeddings.token_embedding.weight": (512, 64),
    "text_model.embeddings.position_embedding.weight": (77, 64),
    "text_model.encoder.layers.0.self_attn.q_proj.weight": (64, 64),
    "text_model.encoder.layers.0.mlp.fc1.weight": (128, 64),
    "text_projection.weight": (64, 64),
}


def header(shapes, prefix="", dtype="BF16"):
    return Header(
        {
            prefix + name: TensorSpec(prefix + name, dtype, tuple(shape))
            for name, shape in shapes.items()
        }
    )


def rows(plan):
    return {layer.name: layer for layer in plan.layers}


def quantized(plan):
    return {layer.name for layer in plan.layers if layer.action == "quantize"}


INSIDE = {"t5": "text_encoders.t5xxl.transformer.", "clip": "text_encoders.clip_l.transformer."}


@pytest.mark.parametrize("place", ["bare", "checkpoint"])
@pytest.mark.parametrize(
    ("shapes", "family", "kept"),
    [
        (flux_shapes(), "flux", {"img_in", "txt_in", "time_in.in_layer", "vector_in.in_layer", "guidance_in.in_layer",
                                 "final_layer.linear", "final_layer.adaLN_modulation.1"}),
        (sd3_shapes(), "sd3", {"context_embedder", "y_embedder.mlp.0", "t_embedder.mlp.0", "final_layer.linear",
                               "joint_blocks.0.x_block.adaLN_modulation.1"}),
        (T5, "t5", {"shared", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"}),
        (CLIP, "clip", {"text_model.embeddings.token_embedding", "text_projection"}),
    ],
    ids=["flux", "sd3", "t5", "clip"],
)  # fmt: skip
def test_a_family_is_recognised_and_its_preset_keeps_the_sensitive_layers(
    shapes, family, kept, place
):
    prefix = "" if place == "bare" else INSIDE.get(family, "model.diffusion_model.")
    plan = make_plan(header(shapes, prefix), INT8)
    assert plan.family == family
    by_name = rows(plan)
    assert all(by_name[prefix + name].action == "keep" for name in kept)
    assert all(f"preset {family}" in by_name[prefix + name].reason for name in kept)
    assert len(quantized(plan)) >= 2
    assert not plan.unmatched


def test_an_unknown_model_gets_the_generic_rule_and_is_told():
    shapes = {
        "patch_embed.weight": (64, 64), "blocks.0.norm1.weight": (64, 64), "blocks.0.attn.qkv.weight": (192, 64),
        "blocks.0.adaLN_modulation.1.weight": (64, 64), "blocks.0.normal_proj.weight": (64, 64),
        "blocks.0.mlp.fc1.weight": (64, 64), "proj_out.weight": (64, 64), "final_layer.linear.weight": (64, 64),
        "blocks.0.attn.out_proj.weight": (64, 64), "lasting.weight": (64, 64), "headroom.weight": (64, 64),
    }  # fmt: skip
    plan = make_plan(header(shapes), INT8)
    assert plan.family == "unknown"
    assert any("not recognised" in warning for warning in plan.warnings)
    assert quantized(plan) == {"blocks.0.attn.qkv", "blocks.0.normal_proj", "blocks.0.mlp.fc1", "blocks.0.attn.out_proj",
                               "lasting", "headroom"}  # fmt: skip


REASONS = {
    "bias.bias": ("not a weight", (64,), "BF16"),
    "conv.weight": ("not 2-D (4-D)", (64, 64, 3, 3), "BF16"),
    "norm.weight": ("not 2-D (1-D)", (64,), "BF16"),
    "mlp.experts.gate_up_proj.weight": ("not 2-D (3-D)", (4, 64, 64), "BF16"),
    "mlp.experts.bank": ("not a weight", (4, 64, 64), "BF16"),
    "thin.weight": ("smaller than 16x16 (8x3072)", (8, 3072), "BF16"),
    "ids.weight": ("not a floating-point tensor (i64)", (64, 64), "I64"),
    "cast.weight": (
        "already 8 bit (F8_E4M3 without a marker; requantize rounds it a second time)",
        (64, 64),
        "F8_E4M3",
    ),
}


@pytest.mark.parametrize(("name", "expected"), REASONS.items(), ids=REASONS)
def test_what_is_no_candidate_is_kept_and_says_why(name, expected):
    reason, shape, dtype = expected
    plan = make_plan(header({name: shape}, dtype=dtype), Recipe(INT8.primary, preset="none"))
    (layer,) = plan.layers
    assert (layer.action, layer.reason) == ("keep", reason)


@pytest.mark.parametrize(
    ("wish", "shape", "format", "reason"),
    [
        ("float8_e4m3fn_blockwise", (1000, 64), "float8_e4m3fn_rowwise", "N=1000 not divisible by 64 -> float8_e4m3fn_rowwise"),
        ("float8_e4m3fn_block3d", (64, 70), "float8_e4m3fn_rowwise", "K=70 not divisible by 64 -> float8_e4m3fn_rowwise"),
        ("int8_blockwise", (100, 128), "int8_tensorwise", "N=100 not divisible by 128 -> int8_tensorwise"),
        ("int8_lodewise", (100, 128), "int8_lodewise", "primary"),
        ("int8_lodewise", (128, 100), "int8_tensorwise", "K=100 not divisible by 128 -> int8_tensorwise"),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_fit_walks_the_chain_and_never_aborts(wish, shape, format, reason):
    plan = make_plan(header({"x.weight": shape}), Recipe(parse_wish(wish), preset="none"))
    (layer,) = plan.layers
    assert (layer.format, layer.requested) == (format, wish)
    assert reason in layer.reason


@pytest.mark.parametrize("name", FORMATS)
def test_planned_tensors_are_the_ones_that_come_out(name):
    source = MemorySource(random_tensors(flux_shapes()))
    recipe = Recipe(parse_wish(name), rules=(Rule("txt_in", parse_wish(name)),))
    sink = MemorySink()
    plan = quantize(source, sink, recipe).plan
    assert {spec.name: (spec.dtype, spec.shape) for spec in plan.outputs} == {
        key: (spec.dtype, spec.shape)
        for key, spec in MemorySource(sink.tensors).header.tensors.items()
    }
    markers = json.loads(sink.metadata["_quantization_metadata"])["layers"]
    stored = {
        key.removesuffix(".comfy_quant"): json.loads(bytes(tensor.tolist()))
        for key, tensor in sink.tensors.items()
        if key.endswith(".comfy_quant")
    }
    assert markers == stored and list(markers) == [
        layer.name for layer in plan.layers if layer.format
    ]


def test_the_input_order_and_foreign_metadata_are_kept():
    source = MemorySource(
        random_tensors(flux_shapes()),
        {
            "modelspec.title": "x",
            "fewbits.recipe": "old",
            "_quantization_metadata": '{"layers": {}}',
        },
    )
    plan = plan_source(source, INT8)
    assert plan.metadata["modelspec.title"] == "x"
    assert plan.metadata["fewbits.recipe"] != "old"
    assert [layer.name for layer in plan.layers] == [
        key.removesuffix(".weight") for key in source.tensors
    ]


@pytest.mark.parametrize(
    "keys",
    [
        ["single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"],
        ["input_hint_block.0.weight", "zero_convs.0.0.weight"],
        ["decoder.conv_in.weight", "encoder.conv_in.weight"],
        ["down_blocks.0.resnets.0.norm1.weight", "mid_block.resnets.0.norm1.weight"],
    ],
    ids=["diffusers Flux", "ControlNet", "VAE", "diffusers UNet"],
)
def test_files_whose_layers_comfyui_cannot_read_quantized_are_refused(keys):
    with pytest.raises(RecipeError, match="this is a .* file"):
        make_plan(header(dict.fromkeys(keys, (64, 64))), INT8)


def test_a_checkpoint_quantizes_the_diffusion_model_and_leaves_the_rest():
    tensors = header(flux_shapes(), "model.diffusion_model.").tensors
    tensors |= header(CLIP, "text_encoders.clip_l.transformer.").tensors
    tensors |= header(
        {"decoder.conv_in.weight": (64, 64), "encoder.conv_in.weight": (64, 64)}, "vae."
    ).tensors
    plan = make_plan(Header(tensors), INT8)
    assert all(name.startswith("model.diffusion_model.") for name in quantized(plan))
    by_name = rows(plan)
    assert (
        "inside a checkpoint"
        in by_name["text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"].reason
    )
    assert by_name["vae.decoder.conv_in"].reason.startswith("VAE: ComfyUI does not read")
    assert not plan.requires_pack


def test_clip_needs_the_pack_because_stock_comfyui_reads_it_as_plain_numbers():
    plan = make_plan(header(CLIP), INT8)
    assert plan.requires_pack
    assert any("only with FewBits installed" in warning for warning in plan.warnings)


def test_embeddings_are_only_quantized_where_comfyui_can_read_them():
    for name, format in FORMATS.items():
        recipe = Recipe(parse_wish(name), preset="none")
        (layer,) = make_plan(header({"shared.weight": (512, 256)}), recipe).layers
        assert (layer.action == "keep") == (format.embedding_min_comfyui is None), name
    assert (
        make_plan(
            header({"shared.weight": (512, 256)}), Recipe(INT8.primary, preset="none")
        ).min_comfyui
        == "0.29.0"
    )


def test_fallback_quantizes_what_the_preset_would_keep():
    plan = make_plan(
        header(flux_shapes()), Recipe(INT8.primary, fallback=parse_wish("float8_e4m3fn"))
    )
    by_name = rows(plan)
    assert by_name["img_in"].format == "float8_e4m3fn"
    assert by_name["single_blocks.0.linear1"].format == "int8_tensorwise"


def test_every_preset_that_a_family_names_exists_and_explains_itself():
    used = [family for family in families() if family.kind != "refuse"]
    assert {family.preset or family.name for family in used} <= set(preset_names())
    for name in preset_names():
        assert all(exclusion.why and exclusion.match for exclusion in load_preset(name).exclude)


def test_prefixes_are_read_off_the_names():
    parts = find_parts(header(CLIP, "text_encoders.clip_l.transformer.").tensors)
    assert [(part.family.name, part.prefix) for part in parts] == [
        ("clip", "text_encoders.clip_l.transformer.")
    ]
    assert not find_parts(["my" + name for name in CLIP])


def test_a_zero_and_an_empty_layer_convert():
    tensors = {"zero.weight": torch.zeros(32, 48), "one.weight": torch.ones(17, 129)}
    for name in ("float8_e4m3fn", "int8_tensorwise"):
        sink = MemorySink()
        report = quantize(MemorySource(tensors), sink, Recipe(parse_wish(name), preset="none"))
        assert not sink.tensors["zero.weight"].view(torch.uint8).any()
        assert {result.name: result.rel_l2 for result in report.results}["zero"] == 0.0
