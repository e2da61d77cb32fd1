"""Which shapes a format takes, what it says when it does not, and where a layer goes instead (docs/formats.md#fallbacks)."""

import pytest

from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.formats import FORMATS, get_format
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import Header, LayerPlan, TensorSpec


def plan(
    wish: str, shape: tuple[int, int], bias: bool = False, name: str = "blocks.0.mlp"
) -> LayerPlan:
    specs = [TensorSpec(f"{name}.weight", "BF16", shape)]
    if bias:
        specs.append(TensorSpec(f"{name}.bias", "BF16", shape[:1]))
    header = Header({spec.name: spec for spec in specs})
    return make_plan(header, Recipe(parse_wish(wish), preset="none")).layers[0]


CONVROT = "int8_tensorwise:convrot=true"
CHAIN = [
    ("float8_e4m3fn_blockwise", (1000, 128), "float8_e4m3fn_rowwise", {"scaling": "row"}, "N=1000 not divisible by 64"),
    ("float8_e4m3fn_blockwise", (128, 70), "float8_e4m3fn_rowwise", {"scaling": "row"}, "K=70 not divisible by 64"),
    ("float8_e4m3fn_block3d", (1000, 128), "float8_e4m3fn_block3d", {"block_size": 64}, None),
    ("float8_e4m3fn_block3d", (128, 70), "float8_e4m3fn_rowwise", {"scaling": "row"}, "K=70 not divisible by 64"),
    ("int8_blockwise", (100, 128), "int8_tensorwise", {"scaling": "row"}, "N=100 not divisible by 128"),
    ("int8_lodewise", (100, 70), "int8_tensorwise", {"scaling": "row"}, "K=70 not divisible by 128"),
    (CONVROT, (64, 512), "int8_tensorwise", {"scaling": "row", "convrot": True, "convrot_groupsize": 256}, None),
    (
        CONVROT, (64, 1152), "int8_tensorwise", {"scaling": "row", "convrot": True, "convrot_groupsize": 64},
        "ConvRot 256 -> 64: K=1152",
    ),
    (
        CONVROT, (64, 48), "int8_tensorwise", {"scaling": "row", "convrot": True, "convrot_groupsize": 16},
        "ConvRot 256 -> 16: K=48",
    ),
    (CONVROT, (64, 70), "int8_tensorwise", {"scaling": "row"}, "ConvRot 256 -> none: K=70"),
    (
        CONVROT + ",convrot_groupsize=64", (64, 80), "int8_tensorwise",
        {"scaling": "row", "convrot": True, "convrot_groupsize": 16}, "ConvRot 64 -> 16: K=80",
    ),
    ("convrot_w4a4", (64, 512), "convrot_w4a4", {"convrot_groupsize": 256, "linear_dtype": "int4"}, None),
    (
        "convrot_w4a4", (64, 1152), "convrot_w4a4", {"convrot_groupsize": 64, "linear_dtype": "int4"},
        "ConvRot 256 -> 64: K=1152",
    ),
    ("convrot_w4a4", (64, 80), "int8_tensorwise", {"scaling": "row"}, "K=80 not divisible by 64"),
    (
        "convrot_w4a4:convrot_groupsize=16", (64, 64), "convrot_w4a4",
        {"convrot_groupsize": 16, "linear_dtype": "int4"}, None,
    ),
    ("asym_w4a8_int8", (64, 1152), "asym_w4a8_int8", {"convrot_groupsize": 64}, "ConvRot 256 -> 64: K=1152"),
    ("asym_w4a8_int8", (64, 80), "asym_w4a8_int8", {"convrot_groupsize": 16}, "ConvRot 256 -> 16: K=80"),
    ("asym_w4a8_int8", (64, 70), "int8_tensorwise", {"scaling": "row"}, "K=70 not divisible by 16"),
    ("mxfp8", (64, 96), "mxfp8", {}, None),
    ("mxfp8", (1000, 1000), "mxfp8", {}, "padded 1000x1000 -> 1024x1024"),
    ("mxfp8", (20, 40), "float8_e4m3fn", {"scaling": "tensor"}, "padding 20x40 -> 32x64 adds more than 25 %"),
    ("nvfp4", (1000, 70), "nvfp4", {}, "padded 1000x70 -> 1008x80"),
    ("nvfp4", (20, 40), "float8_e4m3fn", {"scaling": "tensor"}, "padding 20x40 -> 32x48 adds more than 25 %"),
    ("nvfp4", (16, 64), "nvfp4", {}, None),
    ("bnb_nf4", (64, 33), "int8_tensorwise", {"scaling": "row"}, "K=33 is odd"),
    ("bnb_fp4", (64, 33), "int8_tensorwise", {"scaling": "row"}, "K=33 is odd"),
    ("bnb_nf4", (64, 96), "bnb_nf4", {"block_size": 64}, "blocks of 64 straddle rows: K=96, no fast kernel"),
    ("bnb_nf4", (64, 128), "bnb_nf4", {"block_size": 64}, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "shape", "chosen", "options", "reason"),
    CHAIN,
    ids=[f"{case[0]} {case[1]}" for case in CHAIN],
)
def test_a_layer_walks_the_chain_to_the_nearest_format_that_fits(
    wish, shape, chosen, options, reason
):
    layer = plan(wish, shape)
    assert (layer.action, layer.format) == ("quantize", chosen)
    assert layer.options.stated() == options
    assert layer.requested == wish.partition(":")[0]
    changed = chosen != wish.partition(":")[0]
    expected = reason and (f"{reason} -> {chosen}" if changed else reason)
    assert layer.reason == "; ".join(filter(None, ["primary", expected]))


METHODS = [
    ("bnb_fp4", "mse_clip", "nearest"),  # a format's own method stays with it
    ("bnb_fp4:method=mse_clip", "mse_clip", "nearest"),  # the same wish
    ("bnb_fp4:method=nearest", "nearest", "nearest"),
    ("bnb_fp4:method=svd", "svd", "svd"),
    ("bnb_nf4", "nearest", "nearest"),
    ("bnb_nf4:method=mse_clip", "mse_clip", "mse_clip"),
]


@pytest.mark.parametrize(("wish", "fitting", "changed"), METHODS, ids=[case[0] for case in METHODS])
def test_a_method_goes_along_the_chain_unless_it_is_the_formats_own(wish, fitting, changed):
    assert plan(wish, (64, 128)).method == fitting
    assert (plan(wish, (64, 33)).format, plan(wish, (64, 33)).method) == (
        "int8_tensorwise",
        changed,
    )


def test_options_of_the_method_and_precision_go_along_the_chain():
    layer = plan("bnb_nf4:method=svd,num_iter=7,full_precision_matrix_mult=true", (64, 33))
    assert (
        layer.method_options == (("num_iter", 7),)
        and layer.marker["full_precision_matrix_mult"] is True
    )


def test_padding_may_add_up_to_a_quarter():
    assert (
        plan("mxfp8", (128, 77)).reason == "primary; padded 128x77 -> 128x96"
    )  # 1.247 times the elements
    assert plan("mxfp8", (128, 76)).format == "float8_e4m3fn"  # 1.263
    assert plan("nvfp4", (52, 64)).format == "nvfp4"  # 1.231
    assert plan("nvfp4", (51, 64)).format == "float8_e4m3fn"  # 1.255


def test_a_padded_layer_with_a_bias_says_that_it_runs_dequantized():
    rows, columns = plan("nvfp4", (1000, 80), bias=True), plan("nvfp4", (1008, 70), bias=True)
    assert rows.reason == "primary; padded 1000x80 -> 1008x80; runs dequantized in ComfyUI"
    assert columns.reason == "primary; padded 1008x70 -> 1008x80"


@pytest.mark.parametrize("name", FORMATS)
def test_an_embedding_table_is_quantized_only_where_comfyui_reads_it(name):
    layer = plan(name, (256, 256), name="text_model.embed_tokens")
    if name in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise"):
        assert (layer.action, layer.format) == ("quantize", name)
    else:
        assert (layer.action, layer.reason) == ("keep", "embedding table")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "shape", [(100, 70), (16, 17), (1000, 1001), (17, 129), (16, 16), (4096, 30)], ids=str
)
def test_no_shape_stops_a_plan(name, shape):
    layer = plan(name, shape, bias=True)
    assert layer.action == "quantize"
    assert sum(spec.nbytes for spec in layer.outputs) > 0


NATIVE = {
    "float8_e4m3fn": "0.4.0", "float8_e5m2": "0.8.0", "nvfp4": "0.8.0", "mxfp8": "0.18.0", "int8_tensorwise": "0.27.0",
    "convrot_w4a4": "0.28.0", "asym_w4a8_int8": "0.31.0",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_the_minimum_comfyui_is_that_of_the_format_page(name):
    format = get_format(name)
    assert format.native is (name in NATIVE)
    assert format.min_comfyui == NATIVE.get(name, "0.8.0")


REFUSED = [
    ("mxfp8", {"block_size": 32}, "format mxfp8 has no option 'block_size'"),
    ("bnb_nf4", {"block_size": 48}, "block_size must be one of 32, 64, 128"),
    ("bnb_nf4", {"scaling": "row"}, "has no option 'scaling'"),
    (
        "convrot_w4a4",
        {"convrot_groupsize": 1024},
        "convrot_groupsize must be one of 256, 64, 16",
    ),
    ("convrot_w4a4", {"linear_dtype": "fp8"}, "linear_dtype must be one of int4, int8"),
    (
        "int8_tensorwise",
        {"convrot_groupsize": 64},
        "convrot_groupsize needs convrot = true",
    ),
    (
        "int8_tensorwise",
        {"scaling": "tensor", "convrot": True},
        "convrot needs scaling row; got tensor",
    ),
    ("float8_e4m3fn", {"convrot": True}, "has no option 'convrot'"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"), REFUSED, ids=[f"{case[0]}: {case[2]}" for case in REFUSED]
)
def test_options_that_do_not_apply_are_refused(name, options, message):
    with pytest.raises(RecipeError, match=message):
        get_format(name).configure(options)
