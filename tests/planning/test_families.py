"""Model families on real key names and shapes: recognised by one entry, kept where it matters, still recognised packed."""

import re

import pytest
import torch

from fewbits.quant_ops.planning.match import matches
from fewbits.quant_ops.planning.model_family import families, find_parts, load_preset, preset_names
from fewbits.quant_ops.planning.planner import TABLE, make_plan, not_a_candidate
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import Header, TensorSpec
from support.comfy_models import DIFFUSION, MODELS, Model
from support.model_classes import CONFIGS, build

INT8 = Recipe(parse_wish("int8_tensorwise"))
BLOCKS = r"(double|single)_blocks\.\d+\..*"
REFINED = (
    r"(layers|noise_refiner|context_refiner|siglip_refiner)\.\d+\.(attention|feed_forward)\..*"
)
UNET = (
    r"(input_blocks|middle_block|output_blocks)\.[\d.]+\.(transformer_blocks\..*|proj_in|proj_out)"
)
ATTENDED = r"(input_blocks|middle_block|output_blocks)\.[\d.]+\.transformer_blocks\..*"
PREDICT2 = r"blocks\.\d+\.(self_attn|cross_attn|mlp)\..*"
LLM = r"model\.layers\.\d+\..*"
T5 = r"encoder\.block\.\d+\.layer\.\d\.(SelfAttention\.[qkvo]|DenseReluDense\.w.*)"
# Candidates below the prefix that are quantized with `auto`; every other one is kept.
QUANTIZED = {
    "flux": BLOCKS, "flux2": BLOCKS, "chroma": BLOCKS, "radiance": BLOCKS, "hunyuan_video": BLOCKS,
    "sd3": r"joint_blocks\.\d+\.(x|context)_block\.(attn|mlp)\..*", "sdxl": ATTENDED, "sd15": UNET,
    "qwen_image": r"(?!transformer_blocks\.0\.img_mod\.1$)transformer_blocks\.\d+\..*", "wan": r"(vace_)?blocks\.\d+\..*",
    "z_image": REFINED, "lumina2": REFINED, "ltxv": r"(?!.*to_gate_logits)transformer_blocks\.\d+\..*",
    "pixart": r"blocks\.\d+\..*", "auraflow": r"(double|single)_layers\.\d+\..*",
    "hidream": r"(double|single)_stream_blocks\.\d+\..*", "cosmos": r"blocks\.block\d+\.blocks\.\d+\.block\..*",
    "cosmos_predict2": PREDICT2, "anima": PREDICT2.replace("\\d+", "[1-9]\\d*", 1), "t5": T5, "umt5": T5,
    "clip": r"text_model\.encoder\.layers\.\d+\..*", "qwen2_text": LLM, "qwen3_text": LLM, "gemma": LLM, "mistral": LLM,
}  # fmt: skip
# Tensors that published text encoder files carry and ComfyUI's classes do not have.
ONLY_IN_FILES = {
    "t5": ("decoder.block.0.layer.0.SelfAttention.q", "lm_head", "encoder.embed_tokens"),
    "gemma": ("lm_head", "multi_modal_projector.mm_input_projection"),
    "mistral": (
        "lm_head",
        "vision_tower.transformer.layers.0.attention.q_proj",
        "multi_modal_projector.linear_1",
    ),
    "qwen_text": ("lm_head", "model.visual.blocks.0.attn.qkv"),
    "clip": ("transformer.text_projection",),
}


def header_of(shapes: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()})


def built(model: Model) -> torch.nn.Module:
    try:
        return model.module()
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this ComfyUI does not have {model.name}: {error}")


@pytest.fixture(params=MODELS, ids=lambda model: model.name)
def model(request, comfy):
    return request.param


def test_a_real_model_is_recognised_by_one_family_and_planned_as_its_preset_says(model):
    module = built(model)
    header = header_of(model.shapes(module))
    assert [(part.family.name, part.prefix) for part in find_parts(header.tensors)] == [
        (model.family, model.prefix)
    ]
    plan = make_plan(header, INT8)
    assert plan.family == model.family
    assert not plan.unmatched and not any("not recognised" in warning for warning in plan.warnings)
    candidates = {layer.name for layer in plan.layers if not not_a_candidate(layer.inputs[0])}
    expected = {
        name
        for name in candidates
        if re.fullmatch(QUANTIZED[model.family], name.removeprefix(model.prefix))
    }
    quantized = {layer.name for layer in plan.layers if layer.action == "quantize"}
    assert quantized == expected
    assert quantized <= model.linears(module), "ComfyUI would read these as plain numbers"
    kept = [layer for layer in plan.layers if layer.name in candidates - quantized]
    assert kept and all(
        layer.reason == TABLE
        or (layer.reason.startswith("preset ") and layer.rule.startswith("preset "))
        for layer in kept
    )


@pytest.fixture(scope="module")
def names(comfy):
    """preset -> base names of every real model that gets it."""
    import comfy.supported_models

    presets = {family.name: family.preset or family.name for family in families()}
    found: dict[str, set[str]] = {name: set(extra) for name, extra in ONLY_IN_FILES.items()}
    for model in MODELS:
        shapes = model.shapes(built(model))
        bases = {name.removeprefix(model.prefix).removesuffix(".weight") for name in shapes}
        found.setdefault(presets[model.family], set()).update(bases)
    for cls in comfy.supported_models.models:
        if cls.__name__ in CONFIGS:
            shapes = build(cls).shapes
            (part,) = find_parts(header_of(shapes).tensors)
            bases = {name[len(part.prefix) :].removesuffix(".weight") for name in shapes}
            found.setdefault(presets[part.family.name], set()).update(bases)
    return found


RELATIVES = {"t5xxl": "t5", "umt5": "t5", "zimage_refiner": "zimage", "distillation_large": "chroma",
             "distillation_small": "chroma", "sdxl": "sd15", "nerf_large": "radiance", "nerf_small": "radiance"}  # fmt: skip


# Encoders whose ComfyUI classes are not built here, and diffusion families that test_every_class.py builds.
NOT_BUILT = {
    "t5_small", "t5_old", "ace_step_1_5_text", "ace_step_1_5_lm", "t5_gemma", "jina_clip", "bert", "gpt_oss", "qwen35_text", "qwen3_vl_text", "gemma4",
    "minimax_music", "minimax_music_text", "trellis2", "qwen_image21", "kandinsky6", "yue2", "sensenova", "prism", "ming_image_text", "yue2_text",  # newer than the ComfyUI that the tests pin
}  # fmt: skip


# Layers of variants that are not built here; the head's bias is in no published file.
ONLY_IN_SOME_FILES = {
    "lm_head.*", "model.lm_head", "vision_model.*", "visual_projection", "audio_model.*", "audio_projector.*", "text_embedding_projection.*", "guidance_in.*", "cam_dec.*", "cam_enc.*", "ofs_embedding_linear_*", "*.to_local_embed.*",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", [name for name in preset_names() if name not in {"generic", *NOT_BUILT}]
)
def test_every_pattern_of_a_preset_matches_something_in_a_real_model(preset, names):
    groups = (*load_preset(preset).exclude, *load_preset(preset).drop)
    assert groups
    known = names[RELATIVES.get(preset, preset)]
    missed = [
        p for group in groups for p in group.match if not any(matches(p, name) for name in known)
    ]
    assert set(missed) <= ONLY_IN_SOME_FILES


def test_every_family_is_tested_on_a_real_model(comfy):
    import comfy.supported_models

    built_here = {model.family for model in MODELS}
    for cls in comfy.supported_models.models:
        parts = find_parts(header_of(build(cls).shapes).tensors)
        built_here.update(part.family.name for part in parts)
    assert (
        built_here == {family.name for family in families() if family.kind != "refuse"} - NOT_BUILT
    )


CLASSIC = ("t5xxl", "mistral", "distillation_large", "distillation_small", "nerf_large", "nerf_small", "radiance", "wan",
           "qwen", "hunyuan", "zimage", "zimage_refiner", "flux2")  # fmt: skip


def test_the_classic_preset_names_exist():
    assert set(CLASSIC) <= set(preset_names())


def test_presets_add_up():
    both = load_preset("distillation_small+nerf_small")
    assert {p for group in both.exclude for p in group.match} >= {
        "distilled_guidance_layer.*",
        "nerf_blocks.*",
    }


@pytest.mark.slow
@pytest.mark.parametrize("wish", ["bnb_nf4", "nvfp4"])
@pytest.mark.parametrize("model", DIFFUSION, ids=[model.name for model in DIFFUSION])
def test_comfyui_recognises_the_packed_file_as_it_does_the_original(model, wish, comfy):
    """Detection reads shapes; what it reads must not be packed."""
    from comfy.model_detection import detect_unet_config

    shapes = model.shapes(built(model))
    plan = make_plan(header_of(shapes), Recipe(parse_wish(wish)))
    packed = {spec.name: spec.shape for spec in plan.outputs}
    assert packed != shapes

    def detected(found):
        empty = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
        return detect_unet_config(empty, model.prefix)

    before, after = detected(shapes), detected(packed)
    assert before is not None and after == before


@pytest.mark.parametrize(
    "family", [family for family in families() if family.kind != "refuse"], ids=lambda f: f.name
)
def test_a_familys_own_keys_are_claimed_by_no_other_family(family):
    sizes = dict(family.size)
    own = header_of({key: (sizes.get(key, 64), 64) for key in family.keys}).tensors
    assert [part.family.name for part in find_parts(own)] == [family.name]
    more = header_of(dict.fromkeys(family.without, (64, 64))).tensors
    assert not family.without or find_parts({**own, **more}) != find_parts(own)


NEWER = {  # what ComfyUI 0.33.0 recognises a model by, what is kept of it, what is quantized
    "minimax_music": (
        ["cond_layer_logits", "latent_conditioners.0.weight"],
        [
            "diffusion_transformer.transformer.project_in",
            "diffusion_transformer.transformer.project_out",
            "diffusion_transformer.to_timestep_embed.0",
        ],
        [
            "diffusion_transformer.transformer.layers.0.self_attn.to_qkv",
            "diffusion_transformer.transformer.layers.0.ff.ff.2",
        ],
    ),
    "trellis2": (
        [],
        ["img2shape.t_embedder.mlp.0", "img2shape.input_layer", "img2shape.adaLN_modulation.1", "img2shape.out_layer"],
        ["img2shape.blocks.0.self_attn.to_qkv", "structure_model.blocks.0.cross_attn.to_kv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NEWER)
def test_models_newer_than_the_pinned_comfyui_have_a_row(family):
    others, kept, quantized = NEWER[family]
    tensors = {f"{name}.weight": (64, 64) for name in (*kept, *quantized)}
    specs = {
        name: TensorSpec(name, "BF16", shape)
        for name, shape in {**tensors, **dict.fromkeys(others, (64,))}.items()
    }
    plan = make_plan(Header(specs), Recipe(parse_wish("int8")))
    assert family in plan.family.split(", ")
    assert {layer.name for layer in plan.layers if layer.format} == set(quantized)
