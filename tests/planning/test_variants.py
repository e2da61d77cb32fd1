"""Models of ComfyUI's classes as they are published with other arguments: recognised, planned with care, still recognised."""

import re

import pytest
import torch

from fewbits.quant_ops.planning.model_family import find_parts
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import Header, ModelPlan, TensorSpec
from support.model_classes import Built, build_with
from support.model_variants import VARIANTS, WITHOUT

pytestmark = pytest.mark.slow  # ComfyUI builds every one of them

# Halved rows, one long column, and rows padded to 32.
PACKED = [("nvfp4", "none"), ("bnb_nf4", "auto"), ("mxfp8", "none")]
# Other classes that ComfyUI itself takes a variant for.
OTHER = {
    "Ovis-Image": "FluxSchnell",
    "HunyuanVideo of 32 channels": "HunyuanVideoSkyreelsI2V",
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request, comfy):
    import comfy.supported_models

    cls, different = VARIANTS[request.param]
    cls = getattr(comfy.supported_models, cls)
    return request.param, build_with(cls, different, WITHOUT.get(request.param, ()))


def header_of(built: Built) -> Header:
    return Header({name: TensorSpec(name, "BF16", shape) for name, shape in built.shapes.items()})


def plan_of(built: Built, wish: str, **recipe: object) -> ModelPlan:
    return make_plan(header_of(built), Recipe(parse_wish(wish), **recipe))


def test_it_is_planned_as_its_class_is(variant):
    _, built = variant
    plan = plan_of(built, "int8_tensorwise")
    (part,) = find_parts(header_of(built).tensors)
    assert part.family.kind == "diffusion" and plan.family == part.family.name
    assert not any("not recognised" in line or "lookup" in line for line in plan.warnings)
    quantized = {layer.name for layer in plan.layers if layer.format}
    assert quantized and quantized <= built.linears
    outside = [name for name in quantized if not re.search(r"\.\d+\.[a-z]", name)]
    assert not outside, "layers outside numbered blocks are first, last or embedders"


def test_comfyui_recognises_it_as_the_same_model_before_and_after(variant):
    name, built = variant
    before = detected(built, header_of(built).tensors.values())
    assert before[1] == OTHER.get(name, built.name)
    for wish, preset in PACKED:
        plan = plan_of(built, wish, preset=preset)
        assert any(layer.format for layer in plan.layers)
        assert detected(built, plan.outputs) == before, wish


def detected(built: Built, specs) -> tuple[object, str | None]:
    from comfy.model_detection import detect_unet_config, model_config_from_unet_config

    tensors = {spec.name: torch.empty(spec.shape, device="meta") for spec in specs}
    config = detect_unet_config(tensors, "net." if built.name == "PiD" else "")
    found = config and model_config_from_unet_config(config, tensors)
    return config, type(found).__name__ if found else None
