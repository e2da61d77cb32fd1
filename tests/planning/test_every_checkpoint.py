"""Diffusion model, text encoders and VAE in one file: the first is quantized as if it were alone, the others stay."""

import pytest

from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_rule, parse_wish
from fewbits.quant_ops.spec import Header, TensorSpec
from support.helpers import clip_shapes, t5_shapes
from support.model_classes import build

pytestmark = pytest.mark.slow  # ComfyUI builds every one of them

MODEL = "model.diffusion_model."
WIDE = 1024  # of the encoder under OpenCLIP's names


def openclip(prefix, layers=2):
    """A text encoder under OpenCLIP's names."""
    shapes = {"token_embedding.weight": (49408, WIDE), "positional_embedding": (77, WIDE), "text_projection": (WIDE, WIDE)}  # fmt: skip
    for at in range(layers):
        base = f"transformer.resblocks.{at}."
        shapes |= {
            f"{base}attn.in_proj_weight": (3 * WIDE, WIDE),
            f"{base}attn.out_proj.weight": (WIDE, WIDE),
        }
        shapes |= {
            f"{base}mlp.c_fc.weight": (4 * WIDE, WIDE),
            f"{base}mlp.c_proj.weight": (WIDE, 4 * WIDE),
        }
    return {prefix + name: shape for name, shape in shapes.items()}


def under(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def vae(prefix):
    shapes = {"decoder.conv_in.weight": (512, 4, 3, 3), "encoder.conv_in.weight": (128, 3, 3, 3)}
    return under(
        prefix,
        shapes | {"decoder.mid.attn_1.q.weight": (512, 512), "quant_conv.weight": (8, 8, 1, 1)},
    )


CLIP_L = clip_shapes()
T5 = t5_shapes(2, 4096, 10240)
SDXL = under("conditioner.embedders.0.transformer.", CLIP_L) | openclip(
    "conditioner.embedders.1.model."
)
TEXT_ENCODERS = under("text_encoders.clip_l.transformer.", CLIP_L) | under(
    "text_encoders.t5xxl.transformer.", T5
)
# class of ComfyUI -> its encoders and its VAE, under the names that its files use
VISUAL = {
    "visual.conv1.weight": (1280, 3, 14, 14),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280),
    "visual.transformer.resblocks.0.attn.out_proj.weight": (1280, 1280),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
}
DINO = {
    "embeddings.patch_embeddings.projection.weight": (1024, 3, 14, 14),
    "encoder.layer.0.attention.attention.query.weight": (1024, 1024),
    "encoder.layer.0.mlp.weights_in.weight": (8192, 1536),
}
CAMERA = {"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)}
CHECKPOINTS = {
    "Stable_Zero123": (under("cond_stage_model.model.", VISUAL) | CAMERA, "first_stage_model."),
    "SD21UnclipH": (openclip("cond_stage_model.model.") | under("embedder.model.", VISUAL), "first_stage_model."),
    "SV3D_u": (under("conditioner.embedders.0.open_clip.model.", VISUAL), "conditioner.embedders.1.encoder."),
    "SD_X4Upscaler": (openclip("cond_stage_model.model."), "first_stage_model."),
    "Hunyuan3Dv2": (under("conditioner.main_image_encoder.model.", DINO), "vae."),
    "SD15": (under("cond_stage_model.transformer.", CLIP_L), "first_stage_model."),
    "SD20": (openclip("cond_stage_model.model."), "first_stage_model."),
    "SDXL": (SDXL, "first_stage_model."),
    "SDXLRefiner": (openclip("conditioner.embedders.0.model."), "first_stage_model."),
    "KOALA_700M": (SDXL, "first_stage_model."),
    "SD3": (TEXT_ENCODERS, "first_stage_model."),
    "Flux": (TEXT_ENCODERS, "vae."),
    "AuraFlow": (under("text_encoders.pile_t5xl.transformer.", t5_shapes(2, 2048, 5120)), "vae."),
    "HunyuanDiT": (under("text_encoders.mt5xl.transformer.", t5_shapes(2, 2048, 5120)), "vae."),
    "GenmoMochi": (under("text_encoders.t5xxl.transformer.", T5), "vae."),
    "LTXV": (under("text_encoders.t5xxl.transformer.", T5), "vae."),
    "HunyuanVideo": (under("text_encoders.clip_l.transformer.", CLIP_L), "vae."),
    "ACEStep": (under("text_encoders.umt5base.transformer.", t5_shapes(2)), "vae."),
    "StableAudio": (under("text_encoders.t5base.transformer.", t5_shapes(2)), "pretransform.model."),
    "Stable_Cascade_C": (under("text_encoder.clip_g.transformer.", clip_shapes()), "vae."),
    "WAN21_T2V": (under("text_encoders.umt5xxl.transformer.", T5), "vae."),
    "Lumina2": ({}, "vae."),
    "SVD_img2vid": ({}, "first_stage_model."),
}  # fmt: skip


def plan_of(shapes, **recipe):
    specs = {name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()}
    return make_plan(Header(specs), Recipe(parse_wish("int8_tensorwise"), **recipe))


def quantized(plan):
    return {layer.name for layer in plan.layers if layer.format}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def files(request, comfy):
    """(shapes of the model alone, of all that stands beside it)"""
    import comfy.supported_models as models

    cls = getattr(models, request.param, None)
    if cls is None:
        pytest.skip(f"this ComfyUI does not have {request.param}")
    encoders, prefix = CHECKPOINTS[request.param]
    bare = {
        name.removeprefix(MODEL): shape
        for name, shape in build(cls).shapes.items()
        if name not in encoders
    }
    return bare, encoders | vae(prefix)


def test_the_diffusion_model_is_quantized_as_if_it_were_alone(files):
    bare, beside = files
    alone, whole = plan_of(bare), plan_of(under(MODEL, bare) | beside)
    assert quantized(alone) and quantized(whole) == {MODEL + name for name in quantized(alone)}
    assert whole.family == alone.family and whole.recognised
    assert whole.requires_pack == alone.requires_pack and whole.min_comfyui == alone.min_comfyui


def test_a_rule_for_everything_reaches_only_what_comfyui_reads_quantized(files):
    bare, beside = files
    unknown = {"safety_checker.layers.0.mlp.fc_in.weight": (1024, 1024)}
    shapes = under(MODEL, bare) | beside | unknown
    made = quantized(plan_of(shapes, rules=(parse_rule("*=float8_e4m3fn"),)))
    elsewhere = (".resblocks.", ".attn_1.", ".main_image_", "safety_checker.")
    assert not any(part in name for name in made for part in elsewhere)
    assert not any(name.endswith("position_embedding") for name in made)
    known = [name for name in beside if name.endswith(("mlp.fc1.weight", ".wi_0.weight"))]
    assert {name.removesuffix(".weight") for name in known} <= made
