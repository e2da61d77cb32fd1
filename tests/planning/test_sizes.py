"""The README's table of formats: sizes of real models from their headers, quality and versions from where they stand."""

import re

import pytest

from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.comfy_models import whole_header
from support.harness import readme

MODELS = ("Flux.1 dev", "Qwen-Image", "Wan 2.1 t2v 14B")
WISHES = {
    "16 bit": None,
    "ConvRot": "int8_tensorwise:convrot=true",
    "mse_clip": "bnb_nf4:method=mse_clip",
}
GB = 1e9


def size(name: str, wish: str | None) -> str:
    """Gigabytes of weights after `fewbits quantize` with the preset of the family."""
    plan = make_plan(whole_header(name), Recipe(parse_wish(wish or "int8_tensorwise")))
    return f"{(plan.bytes_after if wish else plan.bytes_before) / GB:.1f}"


def wish_of(cell: str) -> str | None:
    """`format`, "`format`, ConvRot" or "16 bit" as a wish."""
    label = cell.replace("`", "")
    return WISHES.get(label.rpartition(", ")[2], label)


ROWS = readme.table("choice")[1:]


@pytest.mark.parametrize("row", ROWS, ids=[row[1] for row in ROWS])
def test_the_sizes_are_what_a_plan_says(row, comfy):
    assert row[-3:] == [size(name, wish_of(row[1])) for name in MODELS]


@pytest.mark.parametrize("row", ROWS[1:], ids=[row[1] for row in ROWS[1:]])
def test_quality_and_version_are_those_measured_and_stated(row):
    measured = {cells[0]: cells for cells in readme.table("formats")}
    assert row[2] == measured[row[1]][3]
    format = FORMATS[re.findall(r"`(\w+)`", row[1])[0]]
    assert row[3] == (f"ComfyUI ≥ {format.min_comfyui}" if format.native else "FewBits")
