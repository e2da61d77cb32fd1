"""Samples of models against each other: numbers as numpy has them, ranking, and a sentence to act on."""

import numpy as np
import pytest
import torch

from fewbits.quant_ops.report.models import (
    AMPLIFIED,
    CAPTION,
    Model,
    Sample,
    block_of,
    compare_models,
    picture_metrics,
    sheet,
    suspects,
)


def model(name: str, noise: float, seeds: int = 3, layers: dict | None = None) -> Model:
    """Samples whose latents and pictures have noise added."""
    samples = []
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        steps = [torch.randn(1, 4, 8, 8, generator=draw) for _ in range(3)]
        picture = torch.rand(176, 192, 3, generator=draw)
        own = torch.Generator().manual_seed(1000 + seed)
        steps = [step + noise * torch.randn(step.shape, generator=own) for step in steps]
        picture = (picture + noise * torch.randn(picture.shape, generator=own)).clamp(0, 1)
        samples.append(Sample(steps, picture, seconds=0.1))
    return Model(name, samples, layers=layers or {})


def test_every_number_is_what_numpy_says():
    a, b = model("A", 0), model("B", 0.1)
    (row,) = compare_models(a, [b])["models"]
    for index, step in enumerate(row["steps"]):
        pairs = [
            (x.steps[index].double().numpy().ravel(), y.steps[index].double().numpy().ravel())
            for x, y in zip(a.samples, b.samples, strict=True)
        ]
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
        decibels = [10 * np.log10((x @ x) / ((y - x) @ (y - x))) for x, y in pairs]
        for name, values in (("cosine", cosines), ("snr_db", decibels)):
            assert step[name]["mean"] == pytest.approx(np.mean(values), rel=1e-9)
            error = np.std(values, ddof=1) / np.sqrt(len(values))
            assert step[name]["error"] == pytest.approx(error, rel=1e-6)
            assert step[name]["count"] == 3
    x, y = a.samples[0].picture.double().numpy(), b.samples[0].picture.double().numpy()
    found = picture_metrics(a.samples[0].picture, b.samples[0].picture)
    assert found["psnr"] == pytest.approx(-10 * np.log10(np.mean((x - y) ** 2)), rel=1e-4)
    assert all(0 < found[name] < 1 for name in ("ssim", "ms_ssim", "haarpsi"))


def test_a_model_against_itself_is_identical():
    found = compare_models(model("A", 0), [model("B", 0)])
    assert found["models"][0]["identical"] and found["sentence"] == "B is identical to A."
    assert found["models"][0]["pictures"]["psnr"]["mean"] is None
    assert found["models"][0]["pictures"]["ssim"]["mean"] == pytest.approx(1.0)


def test_the_closest_comes_first_and_a_broken_block_is_named():
    fine = {f"blocks.{i}.attn.qkv": 0.09 + i / 1000 for i in range(12)}
    others = [
        model("broken", 3.0, layers={**fine, "blocks.7.attn.qkv": 7.0}),
        model("4 bits", 0.1, layers=fine),
        model("8 bits", 0.01, layers={name: error / 12 for name, error in fine.items()}),
    ]
    found = compare_models(model("A", 0), others, control=model("A, other seeds", 1.0))
    assert found["ranking"] == ["8 bits", "4 bits", "broken"]
    assert "do not use it" in found["sentence"].split("broken")[1]
    assert "layer blocks.7.attn.qkv in block blocks.7 is broken" in found["sentence"]
    assert found["models"][1]["suspects"] == []
    assert found["control"]["final"]["cosine"]["mean"] < 0.9
    decibels = found["control"]["final"]["snr_db"]["mean"]
    assert found["sentence"].endswith(f". A with other seeds has an SNR of {decibels:.1f} dB.")
    closest = found["models"][2]["final"]["snr_db"]["mean"]
    assert found["sentence"].startswith(f"8 bits differs, with an SNR of {closest:.1f} dB (cosine")


def test_nan_is_not_a_number_to_be_ranked_by():
    bad = model("bad", 0)
    bad.samples[0].steps[-1][:] = float("nan")
    for sample in bad.samples:
        sample.steps[-1][:] = float("nan")
    found = compare_models(model("A", 0), [bad, model("B", 1.0)])
    assert found["ranking"] == ["B", "bad"] and "bad gives NaN" in found["sentence"]


def test_small_pictures_have_no_multiscale_similarity():
    a, b = torch.rand(128, 128, 3), torch.rand(128, 128, 3)
    assert picture_metrics(a, b)["ms_ssim"] is None


def test_the_sheet_shows_both_and_the_amplified_difference():
    a, b = model("A", 0, seeds=2), model("B", 0.02, seeds=2)
    found = sheet(a, [b], control=model("again", 1.0, seeds=2))
    assert found.shape == (3 * (CAPTION + 176), 3 * 192, 3)
    captions, pictures = found[:CAPTION], found[CAPTION : CAPTION + 176]
    first, second = a.samples[0].picture, b.samples[0].picture
    assert torch.equal(pictures[:, :192], first) and torch.equal(pictures[:, 192:384], second)
    expected = ((second - first).abs() * AMPLIFIED).clamp(0, 1)
    assert torch.equal(pictures[:, 384:], expected)
    assert all((captions[:, start : start + 192] < 0.5).any() for start in (0, 192, 384))


def test_captions_grow_with_the_pictures():
    for height, high in ((176, CAPTION), (1024, 64)):
        one = Model("A", [Sample([torch.zeros(1)], torch.ones(height, 1024, 3))])
        found = sheet(one, [one])
        assert found.shape == (high + height, 3 * 1024, 3)
        rows = (found[:high, :1024] < 0.5).any(2).any(1).nonzero()
        letter = int(rows.max() - rows.min()) + 1
        assert 0.35 * high < letter < high  # whole, and as large as there is room for


def test_suspects_are_outliers_and_not_the_merely_worst():
    assert suspects({"a": 0.1, "b": 0.2, "c": 0.15}) == []
    assert suspects({"a": 0.1, "b": 0.1, "c": 0.1, "d": float("inf"), "e": 1.0}) == ["d", "e"]
    assert (
        block_of("single_blocks.3.linear1") == "single_blocks.3" and block_of("img_in") == "img_in"
    )
