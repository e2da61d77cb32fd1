"""Every kind of text encoder that ComfyUI tells apart, in its real size as a header: recognised, planned with care, and
said to open in stock ComfyUI exactly where stock builds it of layers that read codes.

The second table of docs/models.md comes from here: `FEWBITS_WRITE_TABLES=1 python3 dev.py test
tests/nodes/test_every_encoder.py` writes it.
"""

from __future__ import annotations

import contextlib
import re
from unittest import mock

import pytest
import torch

from fewbits.quant_ops.planning.model_family import Family, find_parts
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import Header, ModelPlan, TensorSpec
from support.harness import readme
from support.tiny_encoders import IN_PAIRS, KINDS, ROUTES, Route, encoder, encoders, reads_codes

pytestmark = pytest.mark.slow  # ComfyUI builds every one of them

PACKED = [("nvfp4", "none"), ("bnb_nf4", "auto"), ("mxfp8", "none")]
# Parts that encode no text.
BESIDE_TEXT = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|lm_head)(\.|$)")
EVERY = [*KINDS, *IN_PAIRS]


def header_of(kind: str, type: str = "") -> Header:
    return header_of_shapes(encoder(kind, type)[0])


def header_of_shapes(shapes: dict[str, tuple[int, ...]]) -> Header:
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
    assert not [name for name in quantized if BESIDE_TEXT.search(name)]


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


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_the_plan_claims_stock_comfyui_exactly_where_that_reads_codes(comfy, route):
    """Alone and beside others."""
    family = family_of(route)
    with stock_clip(comfy):
        assert reads_codes(route) == family.stock


def family_of(route: Route) -> Family:
    shapes, _ = encoders(route.type, route.files)[route.about]
    (part,) = find_parts(header_of_shapes(shapes).tensors)
    return part.family


HEADER = ["encoder", "type of Load CLIP", "family", "preset", "opens in"]


def rows() -> list[list[str]]:
    """A row for each way in which a kind is planned; types and what stands beside it are gathered."""
    ways: dict[tuple[str, Family], dict[str, None]] = {}
    for route in ROUTES:
        found = ways.setdefault((route.kind, family_of(route)), {})
        found[route.type.lower()] = None
    return [
        [
            kind,
            ", ".join(types),
            family.title,
            family.preset or family.name,
            "stock" if family.stock else "with FewBits",
        ]
        for (kind, family), types in ways.items()
    ]


def test_the_page_of_models_says_what_the_plans_claim(comfy):
    if "QWEN3VL_32B" not in comfy.sd.TEModel.__members__:
        pytest.skip("the page is about the ComfyUI that the tests pin")
    lines = rows()
    if readme.WRITE:
        readme.write("encoders", HEADER, lines)
    assert readme.table("encoders") == [HEADER, *lines]


@contextlib.contextmanager
def stock_clip(comfy):
    """The CLIP class as it is without the pack."""
    original = comfy.sd.CLIP.__init__.__wrapped__
    with mock.patch.object(comfy.sd.CLIP, "__init__", original):
        yield
