"""`fewbits compare`: two files of any formats, against numbers that numpy makes of the same bytes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import compare_files
from fewbits.quant_ops import reference
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.report import comparison
from support import dialects
from support.helpers import fewbits, random_tensors, tiny_checkpoint

SHAPES = {"a.weight": (64, 128), "a.bias": (64,), "b.weight": (48, 64)}
WISHES = ["int8_tensorwise", "bnb_nf4", "mxfp8", "float8_e4m3fn_blockwise", "int8_tensorwise:convrot=true,convrot_groupsize=64"]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return tiny_checkpoint(tmp_path / "model.safetensors")


def quantized(model, wish):
    out = model.with_name("quantized.safetensors")
    quantize_file(model, out, Recipe(parse_wish(wish), preset="none"), overwrite=True)
    return out


def by_numpy(a, b):
    a, b = (np.asarray(value, dtype=np.float64).ravel() for value in (a, b))
    error = b - a
    return {
        "rel_l2": np.linalg.norm(error) / np.linalg.norm(a),
        "sqnr_db": 20 * np.log10(np.linalg.norm(a) / np.linalg.norm(error)),
        "cosine": a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "largest_error": np.abs(error).max(),
    }


@pytest.mark.parametrize("wish", WISHES)
def test_the_numbers_of_every_layer_are_those_of_the_reference_decoder(model, wish):
    out = quantized(model, wish)
    found = compare_files(model, out)
    original = {name: tensor.float().numpy() for name, tensor in load_file(model).items()}
    decoded = reference.decode_file(out)
    exact = 1e-5 if "convrot" in wish else 2e-6  # rotations are undone in float32, there in float64
    rows = {row["name"]: row for row in found.to_json()["tensors"]}
    assert set(rows) == {f"{name}.weight" for name in decoded} and len(rows) > 10
    for name, truth in decoded.items():
        row = rows[f"{name}.weight"]
        assert (row["first"], row["second"]) == ("BF16", wish.partition(":")[0])
        for key, value in by_numpy(original[f"{name}.weight"], truth).items():
            assert row[key] == pytest.approx(value, rel=exact), (name, key)


def test_the_worst_layer_comes_first_and_totals_are_sums_over_layers(model):
    found = compare_files(model, quantized(model, "bnb_nf4")).to_json()
    errors = [row["rel_l2"] for row in found["tensors"]]
    assert errors == sorted(errors, reverse=True)
    original, total = load_file(model), 0.0
    for row in found["tensors"]:
        total += (row["rel_l2"] * float(original[row["name"]].double().norm())) ** 2
    signal = sum(float(tensor.double().square().sum()) for tensor in original.values())
    assert found["total"]["rel_l2"] == pytest.approx((total / signal) ** 0.5, rel=1e-9)
    assert sum(row["tensors"] for row in found["formats"]) == len(original)


def test_a_file_is_identical_to_itself_and_to_its_codes_in_another_dialect(model, tmp_path):
    assert compare_files(model, model).identical
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(dialects.bitsandbytes("a", random_tensors(SHAPES)["a.weight"].float()), theirs)
    assert fewbits("convert", theirs, "-o", ours).returncode == 0
    run = fewbits("compare", theirs, ours)
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "identical"


def test_a_layer_with_a_wrong_scale_is_named_first(model, tmp_path):
    out = quantized(model, "int8_tensorwise")
    tensors = load_file(out)
    tensors["single_blocks.0.linear1.weight_scale"] *= 8
    with_metadata = tmp_path / "broken.safetensors"
    save_file(tensors, with_metadata)
    worst, second, *_ = compare_files(model, with_metadata).worst()
    assert worst.name == "single_blocks.0.linear1.weight"
    assert worst.sums.rel_l2 == pytest.approx(7, rel=0.01) and second.sums.rel_l2 < 0.02


def test_the_command_says_identical_ranks_and_names_the_block_of_a_broken_layer(model, tmp_path):
    """16 bit against itself, INT8 rows, NF4 and INT8 with one scale x 8."""
    int8, nf4, broken = (tmp_path / f"{name}.safetensors" for name in ("int8", "nf4", "broken"))
    quantize_file(model, int8, Recipe(parse_wish("int8_tensorwise"), preset="none"))
    quantize_file(model, nf4, Recipe(parse_wish("bnb_nf4"), preset="none"))
    tensors = load_file(int8)
    tensors["double_blocks.0.img_mlp.0.weight_scale"] *= 8
    save_file(tensors, broken)
    assert fewbits("compare", model, model).stdout.splitlines()[-1] == "identical"
    runs = {path.stem: fewbits("compare", model, path) for path in (int8, nf4, broken)}
    found = {path.stem: json.loads(fewbits("compare", model, path, "--json").stdout) for path in (int8, nf4, broken)}  # fmt: skip
    errors = {name: data["total"]["rel_l2"] for name, data in found.items()}
    assert sorted(errors, key=errors.get) == ["int8", "nf4", "broken"]
    said = "layer double_blocks.0.img_mlp.0 in block double_blocks.0 differs more than 8 x"
    assert [said in run.stdout for run in runs.values()] == [False, False, True]
    assert found["broken"]["suspects"] == ["double_blocks.0.img_mlp.0.weight"]
    assert found["int8"]["suspects"] == found["nf4"]["suspects"] == []


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("said", "broken"),
    [
        ("it is 8 x as large", lambda a, b: (8 * a, b)),
        ("the second file has only zeros there", lambda a, b: (0 * a, b)),
        ("it is another weight, or garbled (cosine", lambda a, b: (b.clone(), b)),
        ("it is another weight, or garbled (cosine", lambda a, b: (a.t().contiguous(), b)),
        ("is broken: 1 elements are NaN or infinite", lambda a, b: (torch.where(a == a.max(), torch.nan, a), b)),
    ],
    ids=["scaled", "zeroed", "swapped", "transposed", "nan"],
)  # fmt: skip
def test_every_way_to_break_a_layer_names_it(tmp_path, said, broken, rounded):
    """Beside layers that were rounded, and beside layers that are the same."""
    generator = torch.Generator().manual_seed(0)
    names = [f"blocks.{i}.proj.weight" for i in range(6)]
    whole = {name: torch.randn((64, 64), generator=generator) for name in names}
    other = {name: weight + 0.01 * rounded * torch.randn((64, 64), generator=generator) for name, weight in whole.items()}  # fmt: skip
    other[names[2]], other[names[4]] = broken(other[names[2]], other[names[4]])
    paths = tmp_path / "whole.safetensors", tmp_path / "other.safetensors"
    save_file(whole, paths[0])
    save_file(other, paths[1])
    found = compare_files(*paths)
    assert found.suspects() == [names[2]]
    named = [line for line in found.to_text().splitlines() if "in block" in line]
    assert len(named) == 1 and said in named[0]
    assert named[0].startswith("layer blocks.2.proj in block blocks.2 ")


def test_two_models_of_one_kind_are_not_called_broken(tmp_path):
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in paths:
        save_file({f"blocks.{i}.proj.weight": torch.randn(64, 64) for i in range(6)}, path)
    assert compare_files(*paths).suspects() == []


@pytest.mark.slow
def test_pictures_are_drawn_where_asked_and_of_nothing_refused(model, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "plots"
    folder.mkdir()
    done = fewbits("compare", model, quantized(model, "bnb_nf4"), "--plots", folder)
    assert done.returncode == 0, done.stderr
    for name in ("error_by_depth.png", "worst_layers.png", "histograms.png"):
        assert Image.open(folder / name).size == (1024, 640)
    same = fewbits("compare", model, model, "--plots", folder)
    assert same.returncode == 2 and "nothing to draw" in same.stderr
    missing = fewbits("compare", model, quantized(model, "bnb_nf4"), "--plots", tmp_path / "no")
    assert missing.returncode == 2 and "no" in missing.stderr


def test_nan_and_infinity_are_counted_rank_first_and_spoil_no_number(tmp_path):
    a, b = random_tensors(SHAPES, torch.float32), random_tensors(SHAPES, torch.float32)
    a["b.weight"][0, 0] = b["b.weight"][0, 0] = torch.nan  # the same in both
    b["b.weight"][1, 1], b["b.weight"][2, 2] = torch.inf, torch.nan
    b["a.weight"] *= 3
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    found = compare_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [(d.name, d.sums.unlike) for d in found.worst()] == [("b.weight", 2), ("a.weight", 0)]
    assert found.worst()[0].sums.rel_l2 == 0
    assert "2 elements not finite in one" in found.to_text()
    json.dumps(found.to_json(), allow_nan=False)


def test_what_only_one_has_other_shapes_and_zeros_are_said(tmp_path):
    tensors = random_tensors(SHAPES, torch.float32)
    save_file({**tensors, "zero.weight": torch.zeros(4, 4)}, tmp_path / "a.safetensors")
    other = {
        **tensors,
        "b.weight": tensors["b.weight"].t().contiguous(),
        "new.weight": torch.ones(3),
    }
    other["zero.weight"] = torch.ones(4, 4)
    save_file(other, tmp_path / "b.safetensors")
    found = compare_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found.only == ((), ("new.weight",)) and not found.identical
    assert found.reshaped == ("b.weight [48, 64] and [64, 48]",)
    (zero,) = found.worst()
    assert zero.name == "zero.weight" and zero.to_json()["rel_l2"] is None
    assert zero.sums.largest == 1 and zero.sums.cosine is None
    text = found.to_text()
    assert "only in b.safetensors: new.weight" in text and "of different shapes: b.weight" in text


def test_a_prefix_that_one_file_lacks_is_left_out(tmp_path):
    tensors = random_tensors(SHAPES)
    save_file(tensors, tmp_path / "bare.safetensors")
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file({**whole, "vae.weight": torch.ones(2)}, tmp_path / "whole.safetensors")
    for pair in (("bare", "whole"), ("whole", "bare")):
        found = compare_files(*(tmp_path / f"{name}.safetensors" for name in pair))
        assert {difference.name for difference in found.differences} == set(tensors)
        assert not found.worst() and sum(map(len, found.only)) == 1


def test_files_of_different_models_are_refused_in_one_line(model, tmp_path):
    save_file({"other.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="share no tensor name"):
        compare_files(model, tmp_path / "other.safetensors")
    run = fewbits("compare", model, tmp_path / "other.safetensors")
    assert run.returncode == 2 and run.stderr.count("\n") == 1


def test_large_tensors_are_summed_in_chunks_with_the_same_result(monkeypatch):
    a, b = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = comparison.measure(a, b)
    monkeypatch.setattr(comparison, "CHUNK", 64)
    parts = comparison.measure(a, b)
    assert parts.largest == whole.largest and parts.elements == whole.elements == 1500
    for key in ("error", "signal", "other", "product"):
        assert getattr(parts, key) == pytest.approx(getattr(whole, key), rel=1e-12)
