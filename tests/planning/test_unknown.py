"""Models that no family explains, and encoders that stock ComfyUI never reads quantized: careful, and said so."""

import pytest

from fewbits.quant_ops.planning.model_family import families, find_parts
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_rule, parse_wish
from fewbits.quant_ops.spec import Header, TensorSpec
from support.helpers import gated_t5_shapes, t5_shapes

INT8 = parse_wish("int8_tensorwise")
ENCODER = {f"text_encoders.t5.transformer.{name}": shape for name, shape in t5_shapes(2).items()}
VAE = {"vae.decoder.conv_in.weight": (64, 4, 3, 3), "vae.encoder.conv_in.weight": (64, 3, 3, 3)}
BLOCKS = {f"strange.{at}.mixer.weight": (256, 256) for at in range(9)}


def plan_of(shapes, *, biases=(), **recipe):
    specs = {name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()}
    specs |= {name: TensorSpec(name, "BF16", (64,)) for name in biases}
    return make_plan(Header(specs), Recipe(INT8, **recipe))


def quantized(plan):
    return {layer.name for layer in plan.layers if layer.format}


@pytest.mark.parametrize(
    "beside", [{}, ENCODER, VAE, ENCODER | VAE], ids=["alone", "te", "vae", "both"]
)
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "net."])
def test_a_checkpoint_whose_diffusion_model_is_unknown_is_about_that_part(prefix, beside):
    inside = {prefix + name: shape for name, shape in BLOCKS.items()}
    plan = plan_of(inside | beside)
    assert quantized(plan) == {name.removesuffix(".weight") for name in inside}
    assert plan.family == "unknown"
    assert any("model family not recognised" in warning for warning in plan.warnings)


def test_a_text_encoder_alone_is_what_its_file_is_about():
    plan = plan_of(ENCODER)
    assert plan.family == "t5_small" and quantized(plan)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.phoneme_embs", (64, 64)),
        ("mask_tokens", (64, 64)),
        ("layers.0.pitch_table", (64, 64)),
        ("vq.codebook", (64, 64)),
        ("token_embd", (64, 64)),
        ("layers.0.phonemes", (4096, 256)),
    ],
)
def test_what_could_be_a_lookup_table_is_kept_and_named(name, shape):
    shapes = {"blocks.0.proj.weight": (64, 64), f"{name}.weight": shape}
    plan = plan_of(shapes, preset="none")
    assert quantized(plan) == {"blocks.0.proj"}
    assert any(f"could be lookup tables: '{name}'" in warning for warning in plan.warnings)
    assert name not in quantized(plan_of(shapes))
    insisted = plan_of(shapes, rules=(parse_rule(f"{name}=int8_tensorwise"),))
    assert name in quantized(insisted)


def test_a_tall_layer_with_a_bias_multiplies():
    plan = plan_of({"blocks.0.tall.weight": (4096, 64)}, biases=["blocks.0.tall.bias"])
    assert quantized(plan) == {"blocks.0.tall"}


def test_a_blocks_own_projections_are_no_first_and_last_layers():
    plan = plan_of(
        {
            f"{name}.weight": (64, 64)
            for name in (
                "blocks.0.mlp.proj_in", "blocks.0.mlp.proj_out", "blocks.0.attn.out_proj", "proj_in", "vid_out.proj",
                "net.latent_in", "blocks.0.AdaLN_Modulation.1", "video_patch_proj", "first", "last.linear",
            )
        }
    )  # fmt: skip
    assert quantized(plan) == {
        "blocks.0.mlp.proj_in",
        "blocks.0.mlp.proj_out",
        "blocks.0.attn.out_proj",
    }


STOCK = {
    "T5-XXL": (gated_t5_shapes(d_model=4096, d_ff=10240, num_heads=64, num_layers=24), False),
    "T5-11B": (t5_shapes(24, 1024, 65536), False),
    "T5-XL": (t5_shapes(2, 2048, 5120), True),
    "T5-base": (t5_shapes(2), True),
    "UMT5-base": ({**t5_shapes(2), "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (32, 12)}, True),
    "Jina CLIP 2": ({"model.encoder.layers.0.mixer.Wqkv.weight": (3072, 1024), "model.embeddings.word_embeddings.weight": (250002, 1024)}, True),
    "T5-Gemma": ({"model.encoder.layers.0.pre_self_attn_layernorm.weight": (64,), "model.encoder.layers.0.self_attn.q_proj.weight": (64, 64)}, True),
    "BERT": ({"bert.encoder.layer.0.attention.self.query.weight": (64, 64), "bert.embeddings.word_embeddings.weight": (100, 64)}, True),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "needs_pack"), STOCK.values(), ids=STOCK)
def test_the_label_says_where_stock_comfyui_reads_codes_as_numbers(shapes, needs_pack):
    plan = plan_of(shapes)
    assert quantized(plan)
    assert plan.requires_pack is needs_pack
    assert needs_pack == any("only with FewBits" in warning for warning in plan.warnings)


def test_a_lookup_table_of_gemma_4_stays_whatever_is_asked():
    shapes = {
        "model.layers.0.per_layer_input_gate.weight": (256, 1536), "model.layers.0.mlp.gate_proj.weight": (6144, 1536),
        "model.embed_tokens_per_layer.weight": (262144, 8960), "model.embed_tokens.weight": (262144, 1536),
    }  # fmt: skip
    plan = plan_of(shapes, rules=(parse_rule("*=int8_tensorwise"),))
    assert "model.embed_tokens_per_layer" not in quantized(plan)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_name_that_all_files_of_a_family_begin_with_is_no_misplaced_prefix(prefix):
    names = ("patch_blocks.0.attn.qkv_x", "patch_blocks.0.attn.qkv_y", "s_embedder.proj")
    shapes = {f"{prefix}core.{name}.weight": (256, 256) for name in (*names, "y_embedder.proj")}
    plan = plan_of(shapes)
    assert plan.family == "pixeldit"
    assert quantized(plan) == {f"{prefix}core.{name}" for name in names[:2]}


@pytest.mark.parametrize("preset", ["auto", "none"])
@pytest.mark.parametrize("prefix", ["", "model.model."])
def test_what_stands_beside_stable_audios_model_is_never_quantized(prefix, preset):
    """ComfyUI loads it into modules of torch's own, and refuses a file with codes in there."""
    inside = {
        "to_timestep_embed.0.weight": (256, 256),
        "transformer.project_in.weight": (256, 64),
        "transformer.layers.0.self_attn.to_qkv.weight": (768, 256),
        "transformer.layers.0.self_attn.to_out.weight": (256, 256),
    }
    beside = {
        f"conditioner.conditioners.{name}.embedder.embedding.1.weight": (768, 256)
        for name in ("seconds_start", "seconds_total")
    }
    plan = plan_of({prefix + name: shape for name, shape in inside.items()} | beside, preset=preset)
    assert f"{prefix}transformer.layers.0.self_attn.to_out" in quantized(plan)
    assert not [name for name in quantized(plan) if name.startswith("conditioner")]


MUSIC = {
    "model.embed_tokens_prefill.weight": (4096, 256),
    "model.embed_tokens_audio.weight": (1024, 256),
    "model.audio_extra_embedding.weight": (7168, 256),
    "model.lm_head_pruned.weight": (1025, 256),
    "model.layers.0.self_attn.q_norm.weight": (128,),
    "model.layers.0.mlp.down_proj.weight": (256, 512),
    "model.audio_decoder.projection.weight": (256, 256),
    "model.audio_decoder.pos_embedding.weight": (16, 256),
    "model.audio_decoder.audio_heads.0.weight": (1024, 256),
    "model.audio_decoder.layers.0.mlp.down_proj.weight": (256, 512),
}
MERGED = {"model.layers.0.self_attn.qkv_proj.weight": (768, 256),
          "model.layers.0.mlp.gate_up_proj.weight": (1024, 256)}  # fmt: skip
APART = {
    "model.layers.0.self_attn.k_proj.weight": (256, 256),
    "model.layers.0.mlp.gate_proj.weight": (512, 256),
}


@pytest.mark.parametrize("more", [MERGED, APART], ids=["merged", "apart"])
def test_the_tables_of_an_encoder_that_writes_sound_stay(more):
    plan = plan_of({**MUSIC, **more})
    assert plan.family == "minimax_music_text"
    inside = {name.removesuffix(".weight") for name in MUSIC if "mlp" in name}
    assert quantized(plan) == inside | {name.removesuffix(".weight") for name in more}


def test_the_projection_beside_an_encoder_stays():
    encoder = {
        f"model.layers.0.{name}.weight": (64, 64)
        for name in ("self_attn.k_proj", "mlp.gate_proj", "post_feedforward_layernorm")
    }
    projection = {"text_embedding_projection.video_aggregate_embed.weight": (256, 1024)}
    plan = plan_of({**encoder, **projection})
    assert not any(name.startswith("text_embedding") for name in quantized(plan))


# Family -> what newer ComfyUI looks for, with what stands beside it; and what becomes quantized of it.
NEWER = {
    "qwen_image21": (
        "txt_in.text_norm modulation.1 transformer_blocks.0.attn.norm_q img_in proj_out txt_in.in_layer norm_out.linear",
        "transformer_blocks.0.img_mlp.gate_up transformer_blocks.0.attn.to_q",
    ),
    "kandinsky6": (
        "audio_embeddings.in_layer visual_embeddings.in_layer visual_blocks.0.va_modulation.out_layer out_layer.out_layer "
        "video_time_embeddings.out_layer video_text_embeddings.in_layer visual_token_type_embeddings",
        "visual_blocks.0.videoT.feed_forward.in_layer visual_blocks.0.va_cross_attention.to_key",
    ),
    "kandinsky6 of diffusers": (
        "audio_embeddings.in_layer visual_embeddings.in_layer visual_transformer_blocks.0.va_modulation.out_layer "
        "out_layer.out_layer audio_out_layer.out_layer video_time_embeddings.timestep_embedder.linear_2 "
        "video_text_embeddings.in_layer visual_token_type_embeddings",
        "visual_transformer_blocks.0.video_dec_block.feed_forward.net.0.proj "
        "visual_transformer_blocks.0.va_cross_attention.to_key",
    ),
    "sensenova": (
        "language_model.model.embed_tokens language_model.lm_head fm_modules.timestep_embedder.mlp.0 vision_model.x "
        "fm_modules.vision_model_mot_gen.embeddings.patch_embedding language_model.model.layers.0.self_attn.q_norm",
        "language_model.model.layers.0.self_attn.q_proj_mot_gen language_model.model.layers.0.self_attn.k_proj "
        "language_model.model.layers.0.mlp.gate_proj",
    ),
    "ming_image_text": (
        "thinker.embed_tokens thinker.layers.1.mlp.image_gate.proj thinker.layers.1.mlp.gate.proj linear_proj.0 proj_in "
        "vision.blocks.0.attn.qkv proj_out proj_directvlm.1",
        "thinker.layers.0.attention.query_key_value thinker.layers.0.mlp.gate_proj thinker.layers.1.mlp.shared_experts.up_proj "
        "connector.layers.0.self_attn.q_proj",
    ),
    "yue2_text": (
        "model.embed_tokens model.lm_head",
        "model.layers.0.self_attn.qkv_proj model.layers.0.mlp.gate_up_proj",
    ),
    "prism": (
        "video_dit_2.time_projection.1 audio_dit.text_embedding.0 video_dit.time_embedding.0 video_dit.head.head",
        "fusion_blocks.0.a2v_conditioner.inner.q fusion_blocks.0.video_block.self_attn.q video_dit_2.blocks.0.ffn.0",
    ),
    "yue2": (
        "vae2llm llm2vae time_embedder.mlp.0 model.embed_tokens",
        "model.layers.0.self_attn.qkv_proj model.layers.0.mlp.down_proj",
    ),
}


@pytest.mark.parametrize("family", NEWER)
def test_a_model_that_only_newer_comfyui_knows_is_planned_with_care(family):
    kept, inside = (names.split() for names in NEWER[family])
    matrix, vector = (128, 128), (128,)
    shapes = {
        f"{name}.weight": vector if ".norm_" in name or name.endswith("_norm") else matrix
        for name in (*kept, *inside)
    }
    if family == "sensenova":
        shapes["fm_modules.vision_model_mot_gen.embeddings.patch_embedding.weight"] = (
            64,
            3,
            16,
            16,
        )
    beside = {
        "yue2": {"latent_pos_embed.pe": (1, 8, 128)},
        "yue2_text": {"yue2_tokenizer_json": (9,)},
    }
    more = beside.get(family, {})
    plan = plan_of({**shapes, **more})
    family = family.split()[0]
    assert plan.family == family
    assert quantized(plan) == set(inside)
    assert plan.min_comfyui == next(f.since for f in families() if f.name == family)


def test_the_language_model_inside_a_diffusion_model_is_no_encoder_beside_it():
    inside = {f"{name}.weight": (128, 128) for name in NEWER["sensenova"][1].split()}
    keys = next(f.keys for f in families() if f.name == "sensenova")
    for prefix in ("", "model.diffusion_model."):
        names = {prefix + name for name in (*inside, *keys)}
        assert [part.family.name for part in find_parts(names)] == ["sensenova"]
    encoder = {f"text_encoders.t5xxl.transformer.{name}" for name in t5_shapes(2)}
    assert [part.family.kind for part in find_parts({*names, *encoder})] == ["text", "diffusion"]


# Models that ComfyUI does not know, and what they share with one that it does.
RELATIVES = {
    "Sana": "t_block.1 blocks.0.cross_attn.kv_linear attention_y_norm",
    "Stable Cascade of diffusers": "clip_txt_mapper clf.1 down_blocks.0.0.channelwise.0 down_blocks.0.2.attention.to_q",
    "Lumina 2 of diffusers": "time_caption_embed.timestep_embedder.linear_1 context_refiner.0.attn.to_q "
    "layers.0.feed_forward.linear_1",
}


@pytest.mark.parametrize("model", RELATIVES)
def test_a_relative_that_comfyui_does_not_know_is_not_taken_for_what_it_knows(model):
    assert not find_parts([f"{name}.weight" for name in RELATIVES[model].split()])
