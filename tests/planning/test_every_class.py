"""Every diffusion model class of ComfyUI, with the widths of a real file: recognised, planned with care, still recognised.

The first table of docs/models.md comes from here: `FEWBITS_WRITE_TABLES=1 python3 dev.py test tests/planning/test_every_class.py`
writes it, and without that the page is compared.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.model_family import families, find_parts
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.spec import Header, ModelPlan, TensorSpec, version_key
from support.harness import readme
from support.model_classes import BY_METADATA, CONFIGS, NEWER, Built, build

pytestmark = pytest.mark.slow  # ComfyUI builds every one of them

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# Halved rows, one long column, and rows padded to 32.
PACKED = [("nvfp4", "none"), ("bnb_nf4", "auto"), ("mxfp8", "none")]
# Least share of the weights that becomes quantized, by number of parameters and with two blocks of each kind where ComfyUI
# counts them; where less than half is, most of the model are convolutions, modulation or conditioning.
MOSTLY_CONVOLUTIONS = {
    "LotusD": 0.30, "Stable_Zero123": 0.27, "SD15_instructpix2pix": 0.27, "SD15": 0.27, "SD20": 0.30, "SD21UnclipL": 0.30,
    "SD21UnclipH": 0.30, "SD_X4Upscaler": 0.34, "SV3D_u": 0.43, "SV3D_p": 0.43, "SVD_img2vid": 0.43, "RT_DETR_v4": 0.14,
    "WAN22_S2V": 0.23, "WAN22_Camera": 0.48, "ACEStep": 0.45,
}  # fmt: skip
MOSTLY_MODULATION = {
    "SD3": 0.47,
    "LTXAV": 0.41,
    "MiniMaxH3": 0.43,
    "ChromaRadiance": 0.42,
    "Anima": 0.20,
}
LEAST = {**MOSTLY_CONVOLUTIONS, **MOSTLY_MODULATION}
# Biases, norms and positions never become codes, whatever their shape.
NEVER = re.compile(
    r"(.*\.)?([a-z_]*norm[0-9]?|[a-z_]*bias|pos_embed[a-z]*|[a-z_]*scale_shift_table)(\.\d+)?"
)


@pytest.fixture(scope="session")
def classes(comfy):
    import comfy.supported_models

    return {cls.__name__: cls for cls in comfy.supported_models.models}


@pytest.fixture(scope="module", params=[*CONFIGS, *NEWER])
def built(request, classes):
    if request.param not in classes:
        pytest.skip(f"this ComfyUI does not have {request.param}")
    return build(classes[request.param])


def test_every_class_of_this_comfyui_has_a_row(classes):
    missing = set(classes) - set(CONFIGS) - set(NEWER)
    assert not missing, f"add them to support/model_classes.py and recipes/families.toml: {missing}"


def header_of(shapes: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorSpec(name, "BF16", shape) for name, shape in shapes.items()})


def plan_of(built: Built, wish: str, **recipe: object) -> ModelPlan:
    return make_plan(header_of(built.shapes), Recipe(parse_wish(wish), **recipe))


def size_of(specs: Iterable[TensorSpec]) -> int:
    return sum(torch.Size(spec.shape).numel() for spec in specs)


def share(plan: ModelPlan) -> float:
    """Parameters that become quantized, of all."""
    quantized = [layer for layer in plan.layers if layer.format]
    return size_of(spec for layer in quantized for spec in layer.inputs) / size_of(
        spec for layer in plan.layers for spec in layer.inputs
    )


def test_it_is_recognised_by_one_family_and_nothing_but_its_linear_layers_is_quantized(built):
    plan = plan_of(built, "int8_tensorwise")
    (part,) = find_parts(header_of(built.shapes).tensors)
    assert plan.family == part.family.name and part.family.kind == "diffusion"
    assert not any("not recognised" in line or "lookup" in line for line in plan.warnings)
    quantized = {layer.name for layer in plan.layers if layer.format}
    assert quantized <= built.linears, "ComfyUI would read these as plain numbers"
    assert not quantized & built.embeddings
    assert not [name for name in quantized if NEVER.fullmatch(name)]


def test_a_lookup_table_stays_even_where_a_rule_asks_for_all(built):
    rules = (parse_rule_for_everything(),)
    plan = make_plan(header_of(built.shapes), Recipe(parse_wish("int8_tensorwise"), rules=rules))
    token_tables = {name for name in built.embeddings if name.endswith("embed_tokens")}
    quantized = {layer.name for layer in plan.layers if layer.format}
    assert not quantized & (built.embeddings - token_tables)


def parse_rule_for_everything():
    from fewbits.quant_ops.planning.recipe import parse_rule

    return parse_rule("*=float8_e4m3fn_blockwise")


def test_enough_of_it_is_quantized_and_first_and_last_layers_are_not(built):
    plan = plan_of(built, "int8_tensorwise")
    assert share(plan) >= LEAST.get(built.name, 0.5)
    outside = [
        layer
        for layer in plan.layers
        if layer.format and not re.search(r"\.\d+\.[a-z]", layer.name)
    ]
    assert not outside, "layers outside numbered blocks are first, last or embedders"


def detected(built: Built, specs: Iterable[TensorSpec]) -> tuple[object, str | None]:
    from comfy.model_detection import (
        detect_unet_config,
        model_config_from_unet_config,
    )

    tensors = {spec.name: torch.empty(spec.shape, device="meta") for spec in specs}
    prefix = "net." if built.name == "PiD" else ""
    config = detect_unet_config(tensors, prefix)
    found = config and model_config_from_unet_config(config, tensors)
    return config, type(found).__name__ if found else None


@pytest.mark.parametrize(("wish", "preset"), PACKED)
def test_comfyui_recognises_the_file_as_the_same_model(built, wish, preset):
    before = detected(built, header_of(built.shapes).tensors.values())
    assert before[1] == BY_METADATA.get(built.name, built.name)
    plan = plan_of(built, wish, preset=preset)
    assert any(layer.format for layer in plan.layers)
    assert detected(built, plan.outputs) == before


OLDER = [line.split("=", 1) for line in os.environ.get("FEWBITS_OLDER_COMFYUI", "").splitlines()]


def test_a_family_is_as_old_as_the_oldest_of_its_classes(classes, comfyui):
    """Older releases are read, not run: a class stands in their supported_models.py or does not."""
    from comfyui_version import __version__

    trees = {**dict(OLDER), __version__: str(comfyui)}
    texts = {
        version: (Path(tree) / "comfy" / "supported_models.py").read_text(encoding="utf-8")
        for version, tree in trees.items()
    }
    first: dict[str, list[str]] = {}
    for name in set(classes) & set(CONFIGS):
        (part,) = find_parts(header_of(build(classes[name]).shapes).tensors)
        having = (version for version, text in texts.items() if f"class {name}(" in text)
        first.setdefault(part.family.name, []).append(min(having, key=version_key))
    oldest = min(texts, key=version_key)
    for family in families():
        if family.name in first:
            found = min(first[family.name], key=version_key)
            assert (family.since or oldest) == found, family.name


HEADER = ["class", "family", "preset", "quantized", "opens in stock ComfyUI"]


def rows(classes: dict[str, type]) -> list[list[str]]:
    known = {family.name: family for family in families()}
    lines = []
    for name in CONFIGS:
        plan = plan_of(build(classes[name]), "int8_tensorwise")
        family = known[plan.family]
        where = "any" if family.stock else "with FewBits"
        lines.append(
            [name, family.title, family.preset or family.name, f"{share(plan):.0%}", where]
        )
    return lines


def test_the_page_of_models_is_what_the_plans_say(classes):
    if set(classes) != set(CONFIGS):
        pytest.skip("the page is about the ComfyUI that the tests pin")
    lines = rows(classes)
    if readme.WRITE:
        readme.write("models", HEADER, lines)
    assert readme.table("models") == [HEADER, *lines]


def test_the_page_names_the_formats_of_stock_comfyui():
    native = ", ".join(f"`{name}`" for name, format in FORMATS.items() if format.native)
    assert f"Stock ComfyUI opens {native};" in PAGE.read_text(encoding="utf-8")
