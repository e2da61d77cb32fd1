"""Layers whose width ComfyUI reads to recognise a model are not packed unless the user insists."""

import pytest
import tomllib

from fewbits.quant_ops.planning.model_family import RECIPES, families, width_layers
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_rule, parse_wish
from fewbits.quant_ops.spec import Header, LayerPlan, ModelPlan, TensorSpec
from support.helpers import flux_shapes, sd3_shapes

TABLE = tomllib.loads((RECIPES / "families.toml").read_text(encoding="utf-8"))["widths"]
CASES = [
    (family, layer.replace("[14]", "4")) for family, layers in TABLE.items() for layer in layers
]
PACKED = ["nvfp4", "bnb_nf4", "bnb_fp4", "convrot_w4a4", "asym_w4a8_int8"]


def planned(shapes: dict[str, tuple[int, ...]], wish: str, **recipe: object) -> ModelPlan:
    header = Header({name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()})
    return make_plan(header, Recipe(parse_wish(wish), **recipe))


def find(plan: ModelPlan, name: str) -> LayerPlan:
    return next(layer for layer in plan.layers if layer.name == name)


@pytest.mark.parametrize(
    ("family", "layer"), CASES, ids=[f"{family}: {layer}" for family, layer in CASES]
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "prefixed"])
def test_a_layer_of_the_table_is_kept_in_a_model_of_unknown_family(family, layer, prefix):
    name = prefix + layer
    plan = planned(
        {f"{name}.weight": (256, 256), f"{prefix}blocks.7.other.weight": (256, 256)}, "bnb_nf4"
    )
    assert find(plan, name).action == "keep"
    assert find(plan, f"{prefix}blocks.7.other").format == "bnb_nf4"


@pytest.mark.parametrize("wish", PACKED)
def test_every_packed_format_keeps_it_and_says_why(wish):
    layer = find(planned({"x.cond_seq_linear.weight": (256, 256)}, wish), "x.cond_seq_linear")
    assert (layer.action, layer.requested) == ("keep", wish)
    assert layer.reason == "primary; ComfyUI reads its width to recognise the model"


@pytest.mark.parametrize(
    "wish", ["float8_e4m3fn", "int8_tensorwise", "int8_tensorwise:convrot=true", "mxfp8"]
)
def test_formats_that_keep_the_width_may_have_it(wish):
    layer = find(planned({"x.cond_seq_linear.weight": (256, 256)}, wish), "x.cond_seq_linear")
    assert (layer.action, layer.reason) == ("quantize", "primary")


def test_mxfp8_counts_as_packed_where_it_pads():
    layer = find(planned({"x.cond_seq_linear.weight": (250, 250)}, "mxfp8"), "x.cond_seq_linear")
    assert layer.action == "keep"
    assert (
        layer.reason
        == "primary; padded 250x250 -> 256x256; ComfyUI reads its width to recognise the model"
    )


def test_the_fallback_takes_it_unless_that_is_packed_too():
    shapes = {"x.cond_seq_linear.weight": (256, 256)}
    taken = find(
        planned(shapes, "bnb_nf4", fallback=parse_wish("float8_e4m3fn")), "x.cond_seq_linear"
    )
    assert taken.format == "float8_e4m3fn"
    assert "ComfyUI reads its width" in taken.reason
    kept = find(planned(shapes, "bnb_nf4", fallback=parse_wish("nvfp4")), "x.cond_seq_linear")
    assert kept.action == "keep"


@pytest.mark.parametrize(
    "insisting",
    [parse_rule("*cond_seq_linear=bnb_nf4"), parse_rule("*cond_seq_linear=convrot_w4a4")],
    ids=["bnb_nf4", "convrot_w4a4"],
)
def test_insisting_packs_what_the_pack_shows_to_detection_and_nothing_else(insisting):
    plan = planned({"x.cond_seq_linear.weight": (256, 256)}, "int8_tensorwise", rules=(insisting,))
    if insisting.wish.format == "convrot_w4a4":
        # ComfyUI reads it itself, so nothing tells detection the width that it had
        assert find(plan, "x.cond_seq_linear").action == "keep"
        assert any("does not become convrot_w4a4: ComfyUI reads" in line for line in plan.warnings)
        return
    assert find(plan, "x.cond_seq_linear").format == "bnb_nf4"
    assert any(
        warning
        == "layer 'x.cond_seq_linear' becomes bnb_nf4, but ComfyUI reads its width to recognise the model; "
        "keep it with a rule"
        for warning in plan.warnings
    )


@pytest.mark.parametrize(
    ("shapes", "family"), [(flux_shapes(256), "flux"), (sd3_shapes(4), "sd3")], ids=["flux", "sd3"]
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "prefixed"])
def test_a_known_family_keeps_its_own_list_and_nothing_of_others(shapes, family, prefix):
    named = {prefix + name: shape for name, shape in shapes.items()}
    kept = planned(named, "bnb_nf4")
    assert all(find(kept, prefix + layer).action == "keep" for layer in TABLE[family])
    packed = planned(named, "bnb_nf4", preset="none")
    reasons = [find(packed, prefix + layer).reason for layer in TABLE[family]]
    assert all("reads its width" in reason for reason in reasons)


def test_known_families_have_their_list_and_unknown_ones_all():
    assert width_layers("flux") == ("img_in", "txt_in", "vector_in.in_layer")
    assert width_layers("t5") == ()
    assert set(width_layers(None)) == {layer for layers in TABLE.values() for layer in layers}
    assert "widths" not in {family.name for family in families()}
