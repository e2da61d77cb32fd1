"""Files of the command, opened by ComfyUI's own UNETLoader, sampled, and held against the original's pictures."""

import math

import pytest

from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.planning.recipe import parse_wish
from fewbits.quant_ops.spec import ITEM_SIZES, LayerInput
from support.harness import PROMPTS, emoji_workflow, readme
from support.harness.quality import compare, sample
from support.wishes import WISHES, least_ssim, write_emoji

HEADER = ["format", "bits per weight", "file size", "SSIM", "PSNR", "latent cosine", "opens in"]
# What other processors may change in the measured columns; two runs on one machine agree to the last digit.
TOLERANCE = {"SSIM": 0.01, "PSNR": 1.0, "latent cosine": 0.005}


def bits_per_weight(wish):
    """Of a 3072 x 3072 layer, scales included."""
    format = get_format(wish.format)
    layer = LayerInput((3072, 3072), "BF16")
    specs = format.tensor_specs(layer, format.resolve(wish.options)).values()
    return sum(8 * ITEM_SIZES[dtype] * math.prod(shape) for dtype, shape in specs) / (3072 * 3072)


def opens_in(format):
    return f"ComfyUI ≥ {format.min_comfyui}" if format.native else "FewBits"


@pytest.mark.parametrize("label", WISHES)
def test_the_stock_loader_opens_the_file_and_the_picture_stays(
    server, originals, measured, tmp_path_factory, label
):
    wish = parse_wish(WISHES[label])
    path = write_emoji(tmp_path_factory.mktemp("written"), label)
    server.add_model("diffusion_models", path)
    quality = compare(sample(server, path.name), originals)
    format = get_format(wish.format)
    measured[label] = [
        f"`{wish.format}`" + label.removeprefix(wish.format),
        f"{bits_per_weight(wish):.2f}",
        f"{path.stat().st_size / 1e6:.2f} MB",
        f"{quality.ssim:.3f}",
        f"{quality.psnr:.1f} dB",
        f"{quality.latent_cosine:.4f}",
        opens_in(format),
    ]
    assert quality.ssim >= least_ssim(label)


def test_the_readme_says_what_was_measured(measured):
    if len(measured) < len(WISHES):
        pytest.fail("needs the rows of the test above: run the whole file")
    if readme.WRITE:
        readme.write("formats", HEADER, list(measured.values()))
    header, *rows = readme.table("formats")
    assert header == HEADER and [row[0] for row in rows] == [row[0] for row in measured.values()]
    for stated, found in zip(rows, measured.values(), strict=True):
        for column, a, b in zip(HEADER, stated, found, strict=True):
            if column in TOLERANCE:
                assert abs(float(a.split()[0]) - float(b.split()[0])) <= TOLERANCE[column], (
                    column,
                    a,
                    b,
                )
            else:
                assert a == b


def test_a_pack_format_without_the_pack_fails_by_name(stock, tmp_path):
    path = write_emoji(tmp_path, "int8_blockwise")
    stock.add_model("diffusion_models", path)
    run = stock.run(emoji_workflow(path.name, PROMPTS[0]))
    assert run.status == "error" and "int8_blockwise" in run.error["exception_message"]


def test_the_server_starts_without_a_word_about_the_pack(server):
    """Other tests of this server provoke node errors, so only what a start could write is looked for."""
    assert server.stats["devices"][0]["type"] == "cpu"
    assert "IMPORT FAILED" not in server.log and "FewBits: " not in server.log
