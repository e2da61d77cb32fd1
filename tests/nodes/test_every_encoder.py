"""Every kind of text encoder that ComfyUI tells apart, in its real size as a header: recognised, planned with care, and
said to open in stock ComfyUI exactly where stock builds it of layers that read codes.
"""

from __future__ import annotations

import contextlib
import json
from unittest import mock

import pytest
import torch

from fewbits.quant_ops.planning.model_family import find_parts
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import Header, ModelPlan, TensorSpec
from support.tiny_encoders import IN_PAIRS, KINDS, encoder, parts_of, without_memory

PACKED = [("nvfp4", "none"), ("bnb_nf4", "auto"), ("mxfp8", "none")]
# The T5 of the first Cosmos is as narrow as those that stock ComfyUI never reads quantized, and counts as one of them.
CLAIMED_LESS = ("T5_XXL_OLD",)
EVERY = [*KINDS, *IN_PAIRS]
TYPES = [(kind, type) for kind, types in KINDS.items() for type in types]


def header_of(kind: str, type: str = "") -> Header:
    shapes, _ = encoder(kind, type)
    return Header({name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()})


def plan_of(kind: str, wish: str, type: str = "", **recipe: object) -> ModelPlan:
    return make_plan(header_of(kind, type), Recipe(parse_wish(wish), **recipe))


def test_every_kind_of_this_comfyui_has_a_row(comfy):
    missing = {kind.name for kind in comfy.sd.TEModel} - set(EVERY)
    assert not missing, f"add them to support/tiny_encoders.py: {missing}"


@pytest.mark.parametrize("kind", EVERY)
def test_it_is_recognised_and_nothing_but_its_linear_layers_is_quantized(comfy, kind):
    plan = plan_of(kind, "int8_tensorwise")
    (part,) = find_parts(header_of(kind).tensors)
    assert part.family.kind == "text" and plan.family == part.family.name
    assert not any("not recognised" in line or "lookup" in line for line in plan.warnings)
    quantized = {layer.name for layer in plan.layers if layer.format}
    assert quantized and quantized <= encoder(kind)[1]


@pytest.mark.parametrize("kind", EVERY)
def test_comfyui_takes_it_for_itself_before_and_after(comfy, kind):
    assert detected(comfy, header_of(kind).tensors.values()) == kind
    for wish, preset in PACKED:
        plan = plan_of(kind, wish, preset=preset)
        assert any(layer.format for layer in plan.layers)
        assert detected(comfy, plan.outputs) == kind, wish


def detected(comfy, specs) -> str | None:
    found = comfy.sd.detect_te_model({s.name: torch.empty(s.shape, device="meta") for s in specs})
    return found and found.name


@pytest.mark.parametrize(("kind", "type"), TYPES)
def test_the_plan_claims_stock_comfyui_exactly_where_that_reads_codes(comfy, kind, type):
    plan = plan_of(kind, "float8_e4m3fn", type)
    markers = {
        f"{layer.name}.comfy_quant": marker(layer.format) for layer in plan.layers if layer.format
    }
    state = {s.name: torch.empty(s.shape, device="meta") for s in plan.outputs} | markers
    with stock_clip(comfy), without_memory(kind):
        clip = comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType[type])
    part = parts_of(clip)[-1]
    reads_codes = part.operations.__name__ == "MixedPrecisionOps"
    assert reads_codes == (not plan.requires_pack or kind in CLAIMED_LESS)


@contextlib.contextmanager
def stock_clip(comfy):
    """The CLIP class as it is without the pack."""
    original = comfy.sd.CLIP.__init__.__wrapped__
    with mock.patch.object(comfy.sd.CLIP, "__init__", original):
        yield


def marker(format: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
