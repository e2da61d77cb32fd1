"""docs/formats.md against the code: the examples' bytes, thresholds, chains, versions and what `verify` looks for."""

import hashlib
import re
import struct

import pytest
import torch

from fewbits.quant_ops.checkpoint.verify import MISTAKES
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.pipeline import quantize
from fewbits.quant_ops.planning.planner import make_plan
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.sources import DTYPE_NAMES, MemorySink, MemorySource
from fewbits.quant_ops.spec import Header, TensorSpec
from support.harness import readme
from support.harness.emoji import ROOT
from support.vectors import raw

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
EXAMPLES = re.findall(r"<!-- example: (\S+) -->", PAGE)
SHOWN = 16  # bytes of each tensor


def example_weight() -> torch.Tensor:
    """X of the page, (128, 256) bf16; every value is exact in bf16."""
    n, k = torch.arange(128)[:, None], torch.arange(256)[None]
    factor = torch.tensor([1, 0.5, 3, 0.0625])[n % 4]
    exact = ((37 * n + 11 * k) % 31 - 15) / 16 * factor
    assert torch.equal(exact.bfloat16().float(), exact)
    return exact.bfloat16()


def example(wish: str) -> str:
    """The block of one example: marker, then type, shape, first bytes and sum of every tensor."""
    asked = wish + (",method=nearest" if ":" in wish else ":method=nearest")
    sink = MemorySink()
    quantize(MemorySource({"a.weight": example_weight()}), sink, Recipe(parse_wish(asked)))
    stored = {name.removeprefix("a."): tensor for name, tensor in sink.tensors.items()}
    lines = [f"comfy_quant {raw(stored.pop('comfy_quant')).decode()}"]
    for suffix in sorted(stored, key=lambda suffix: (suffix != "weight", suffix)):
        tensor, data = stored[suffix], raw(stored[suffix])
        shape = "(" + ", ".join(map(str, tensor.shape)) + (",)" if tensor.dim() == 1 else ")")
        lines += [
            f"{suffix} {DTYPE_NAMES[tensor.dtype]} {shape} sum {hashlib.sha256(data).hexdigest()[:16]}",
            f"    {data[:SHOWN].hex(' ')}{' ...' if len(data) > SHOWN else ''}",
        ]
    return "```\n" + "\n".join(lines) + "\n```\n"


@pytest.mark.parametrize("wish", EXAMPLES)
def test_an_example_has_the_bytes_that_the_code_makes(wish):
    if readme.WRITE:
        readme.write_block(wish, example(wish))
    assert readme.block(wish) == example(wish)


def test_every_format_has_a_section_with_an_example_and_no_other_has():
    assert {wish.partition(":")[0] for wish in EXAMPLES} == set(FORMATS)
    for name in FORMATS:
        assert f"<!-- example: {name} -->" in SECTIONS[name]


def test_the_example_in_words_is_the_first_row():
    row = example_weight()[0].float()
    assert "Row 0 begins " + " ".join(f"{value:g}" for value in row[:8].tolist()) in PAGE
    assert "codes 0 4 12 0: bytes 04 c0." in SECTIONS["bnb_nf4"]
    assert "\n    04 c0 " in readme.block("bnb_nf4")


def test_the_tables_of_codes_are_those_of_the_kernels():
    from fewbits.kernels import codebook4, w4a8

    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S*) ?\|$", SECTIONS["bnb_nf4"], re.M)
    assert [float(value) for _, value, _ in rows] == list(codebook4.NF4_VALUES)
    assert [float(above) for _, _, above in rows[1:]] == list(codebook4.NF4_THRESHOLDS)
    bits = [int(text, 16) for text in re.findall(r"0x([0-9a-f]{8})", SECTIONS["bnb_fp4"])]
    assert tuple(bits) == codebook4.FP4_THRESHOLD_BITS
    thresholds = [
        struct.unpack(">f", struct.pack(">I", bits))[0] for bits in codebook4.E2M1_THRESHOLD_BITS
    ]
    assert [round(value, 6) for value in thresholds] == [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    levels = re.findall(r"-?0\.\d{6}", SECTIONS["asym_w4a8_int8"])
    assert tuple(map(float, levels)) == w4a8.LEVELS


def test_the_minimum_versions_are_those_of_the_formats():
    table = PAGE.split("## Which ComfyUI opens what")[1].split("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|$", table, re.M)
    native = {
        name: (format.min_comfyui, format.embedding_min_comfyui or "never")
        for name, format in FORMATS.items()
        if format.native
    }
    assert {name: (since, table) for name, since, table in rows} == native


SHAPES = {  # of a layer that the row's reason is about
    "float8_e4m3fn_blockwise": (1000, 1024),
    "float8_e4m3fn_block3d": (64, 70),
    "int8_blockwise": (1000, 1024),
    "int8_lodewise": (64, 70),
    "int8_tensorwise:convrot=true": (64, 1152),
    "convrot_w4a4": (64, 96),
    "asym_w4a8_int8": (64, 24),
    "mxfp8": (20, 40),
    "nvfp4": (20, 36),
    "bnb_nf4": (64, 33),
    "bnb_fp4": (64, 33),
}
CHAIN = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("## Fallbacks")[1].split("\n## ")[0].splitlines()
    if line.startswith("| `")
]


@pytest.mark.parametrize("wish", SHAPES)
def test_a_shape_that_does_not_fit_leads_where_the_page_says(wish):
    name = f"`{wish.partition(':')[0]}`"
    _, _, reason, instead = next(row for row in CHAIN if name in row[0] and row[2])
    spec = TensorSpec("a.weight", "BF16", SHAPES[wish])
    (layer,) = make_plan(Header({spec.name: spec}), Recipe(parse_wish(wish))).layers
    said = re.sub(r"\d+", "N", reason.strip("`"))
    assert said in re.sub(r"\d+", "N", layer.reason)
    assert layer.format == wish.partition(":")[0] or f"`{layer.format}`" in instead


def test_every_format_is_in_the_table_of_fallbacks():
    named = {name for row in CHAIN for name in re.findall(r"`(\w+)`", row[0])}
    assert {"float8_e4m3fn_rowwise" if name == "_rowwise" else name for name in named} == set(
        FORMATS
    )


def test_the_dialects_of_the_page_are_those_of_the_importers():
    table = PAGE.split("## Dialects")[1].split("\n\n")[2]
    cells = [line.split("|")[3] for line in table.splitlines()[2:]]
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    folder = ROOT / "quant_ops" / "checkpoint" / "importers"
    source = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    renamed = {name for format in FORMATS.values() for name in format.read_as}
    assert {name for name in named - renamed if f'"{name}"' not in source} == set()
    hyphenated = set(re.findall(r'"([a-z0-9_]+(?:-[a-z0-9]+)+)"', source)) - {"utf-8"}
    assert hyphenated <= named


def test_the_mistakes_of_the_page_are_those_that_verify_looks_for():
    header = ["name", "what is wrong", "mended by"]
    rows = [
        [f"`{mistake.name}`", mistake.wrong, mistake.fix or "the original model"]
        for mistake in MISTAKES.values()
    ]
    if readme.WRITE:
        readme.write("mistakes", header, rows)
    assert readme.table("mistakes") == [header, *rows]
