"""Histograms of layers: counted as numpy counts the decoder's weights and the stored bytes."""

import io

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewbits.quant_ops import reference
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.errors import QuantError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.report import plots
from fewbits.quant_ops.report.histograms import BINS, SPREAD, histograms
from fewbits.quant_ops.report.plots import histogram_picture
from support.helpers import tiny_checkpoint

LAYER = "single_blocks.0.linear1"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Format -> a tiny model in it; "" is the original."""
    folder = tmp_path_factory.mktemp("histograms")
    found = {"": tiny_checkpoint(folder / "model.safetensors")}
    for format in ("int8_tensorwise", "bnb_nf4", "float8_e4m3fn"):
        found[format] = folder / f"{format}.safetensors"
        quantize_file(found[""], found[format], Recipe(parse_wish(format), preset="none"))
    return found


def drawn(files, format, names=(LAYER,)):
    with FileSource(files[""]) as first, FileSource(files[format]) as second:
        return histograms(names, first, second)


@pytest.mark.parametrize("format", ["int8_tensorwise", "bnb_nf4", "float8_e4m3fn"])
def test_weights_are_counted_as_numpy_counts_what_is_decoded(files, format):
    (found,) = drawn(files, format)
    original = load_file(files[""])[f"{LAYER}.weight"].float().numpy().ravel()
    decoded = reference.decode_file(files[format])[LAYER].ravel()
    reach = SPREAD * original.std(dtype=np.float64)
    assert found.edges[-1] == pytest.approx(reach, rel=1e-5) and len(found.edges) == BINS + 1
    for values, shares in zip((original, decoded), found.weights, strict=True):
        inside = np.clip(values, found.edges[0], found.edges[-1])
        assert shares == pytest.approx(np.histogram(inside, found.edges)[0] / len(values), abs=2e-4)


def test_codes_are_counted_as_they_are_stored(files):
    stored = {format: load_file(files[format])[f"{LAYER}.weight"] for format in files if format}
    (int8,) = drawn(files, "int8_tensorwise")
    values, counts = np.unique(stored["int8_tensorwise"].numpy(), return_counts=True)
    places = values.astype(int) - int8.lowest
    assert (int8.lowest, int8.lowest + len(int8.codes) - 1) == (values[0], values[-1])
    assert int8.codes[places] == pytest.approx(counts / counts.sum())
    (nf4,) = drawn(files, "bnb_nf4")
    packed = stored["bnb_nf4"].numpy().ravel()
    nibbles = np.bincount(np.concatenate([packed >> 4, packed & 15]), minlength=16)
    assert nf4.codes == pytest.approx(nibbles / nibbles.sum()) and nf4.lowest == 0
    (fp8,) = drawn(files, "float8_e4m3fn")
    zeros = float((stored["float8_e4m3fn"].float() == 0).double().mean())
    middle = -fp8.lowest
    assert fp8.codes.sum() == pytest.approx(1.0)
    assert fp8.codes[middle - 1 : middle + 1].sum() == pytest.approx(zeros)


def test_the_code_of_zero_does_not_lean_to_a_side(files):
    """An edge at zero would count it in the bin beside, and show a spike next to a gap."""
    (found,) = drawn(files, "int8_tensorwise")
    assert BINS % 2
    assert found.edges[BINS // 2] == pytest.approx(-found.edges[BINS // 2 + 1])


def test_codes_are_an_area_without_gaps(files):
    pytest.importorskip("matplotlib")
    (found,) = drawn(files, "int8_tensorwise")
    figure, ink = plots._figure("light")
    axes = figure.add_subplot()
    plots._codes(axes, found, ink)
    (area,) = axes.patches
    shares, edges, _ = area.get_data()
    assert shares == pytest.approx(100 * found.codes) and edges[0] == found.lowest - 0.5


def test_a_plain_file_has_no_codes_and_missing_layers_are_left_out(files):
    (found,) = drawn(files, "", names=(LAYER, "no.such.layer"))
    assert found.codes is None and found.name == LAYER


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_has_the_size_of_the_others(files, theme):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    layers = drawn(files, "bnb_nf4", names=(LAYER, "double_blocks.0.img_attn.qkv"))
    picture = Image.open(io.BytesIO(histogram_picture(layers, ["a", "b"], theme)))
    assert picture.size == (1024, 640)
    with pytest.raises(QuantError, match="nothing to draw"):
        histogram_picture([], [])


def test_a_layer_of_zeros_is_drawn_too(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "zero.safetensors"
    save_file({"a.weight": torch.zeros(16, 16)}, path)
    with FileSource(path) as file:
        (found,) = histograms(["a"], file)
    assert found.weights[0].sum() == 1.0 and np.isfinite(found.edges).all()
