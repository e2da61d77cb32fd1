"""Tables of docs/ that end-to-end tests measured: made from tests/results, with what the code itself knows."""

import math

import pytest

from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.planning.recipe import parse_wish
from fewbits.quant_ops.spec import ITEM_SIZES, LayerInput, version_key
from support import results
from support.harness import readme
from support.wishes import WISHES


def name_of(label):
    format = WISHES[label].partition(":")[0]
    return f"`{format}`" + label.removeprefix(format)


def bits_per_weight(wish):
    """Of a 3072 x 3072 layer, scales included."""
    format = get_format(wish.format)
    layer = LayerInput((3072, 3072), "BF16")
    specs = format.tensor_specs(layer, wish.options).values()
    return sum(8 * ITEM_SIZES[dtype] * math.prod(shape) for dtype, shape in specs) / (3072 * 3072)


def opens_in(format):
    return f"ComfyUI ≥ {format.min_comfyui}" if format.native else "FewBits"


def formats_table():
    header = ["format", "bits per weight", "file size", "SSIM", "PSNR", "latent cosine", "opens in"]
    measured = results.load("formats")
    rows = []
    for label in WISHES:
        wish, found = parse_wish(WISHES[label]), measured[label]
        rows.append([
            name_of(label),
            f"{bits_per_weight(wish):.2f}",
            f"{found['megabytes']:.2f} MB",
            f"{found['ssim']:.3f}",
            f"{found['psnr']:.1f} dB",
            f"{found['latent_cosine']:.4f}",
            opens_in(get_format(wish.format)),
        ])  # fmt: skip
    return header, rows


def versions_table():
    measured = results.load("versions")
    versions = sorted(measured, key=version_key)
    header = ["format", *(f"ComfyUI {version}" for version in versions)]
    rows = [[name_of(label), *(measured[v][label] for v in versions)] for label in WISHES]
    return header, rows


@pytest.mark.parametrize(
    ("name", "table"), [("formats", formats_table), ("versions", versions_table)]
)
def test_the_table_is_what_was_measured(name, table):
    header, rows = table()
    if readme.WRITE:
        readme.write(name, header, rows)
    assert readme.table(name) == [header, *rows]


@pytest.mark.parametrize("table", ["formats", "versions"])
def test_nothing_is_stored_that_no_test_measures(table):
    rows = results.load(table)
    labels = [rows] if table == "formats" else rows.values()
    assert all(set(found) == set(WISHES) for found in labels)
