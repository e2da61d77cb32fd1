"""How far the samples of one model are from those of another: latents step by step, final pictures.

JSON first, then a sheet of pictures and one sentence.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from .comparison import LISTED, Sums, block_of, measure, suspects

AMPLIFIED = 8  # x: the differences on the sheet
CAPTION = 18  # pixels above each picture of the sheet, of small ones
CAPTION_PART = 16  # of the height of larger ones: readable where a sheet is shown a fifth as large
LETTERS = 0.65  # of a caption's height
METRICS = ("psnr", "ssim", "ms_ssim", "haarpsi")
SMALLEST_MS_SSIM = 161  # pixels: five scales of 11
BROKEN_COSINE = 0.5  # below this the final latents have little in common


@dataclass(frozen=True)
class Sample:
    """One model and one seed.

    `steps` are the latents that the model predicts at each step and, last, the result, float32 on
    the CPU; `picture` is (H, W, 3) float32 from 0 to 1, None without a VAE.
    """

    steps: Sequence[torch.Tensor]
    picture: torch.Tensor | None = None
    seconds: float = 0.0  # per step


@dataclass(frozen=True)
class Model:
    """One model's samples, a seed each, and what it took; `layers` its weights' errors by name,
    `unpatched` those without the LoRAs of both models, where they are known.
    """

    name: str
    samples: Sequence[Sample]
    peak_bytes: int | None = None
    layers: dict[str, float] = field(default_factory=dict)
    unpatched: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def rounded(self) -> dict[str, float]:
        """Errors that no LoRA explains: those that only one model has show with it, those that were
        baked into codes without it.
        """
        return {
            name: min(error, self.unpatched.get(name, error)) for name, error in self.layers.items()
        }


def why_not_metrics() -> str | None:
    """Why pictures are not measured here; None when they are."""
    if importlib.util.find_spec("piq") is None:
        return "piq is not installed; picture metrics need it: pip install piq"
    return None


def compare_models(reference: Model, others: Sequence[Model], control: Model | None = None) -> dict:
    """Everything about the others against the reference, as JSON; `control` are the reference's own
    samples from other seeds.
    """
    rows = [_against(reference, other) for other in others]
    again = control and _against(reference, control)
    return {
        "reference": _cost(reference),
        "models": rows,
        "control": again,
        "ranking": [row["name"] for row in sorted(rows, key=_rank)],
        "metrics": why_not_metrics() or "piq",
        "sentence": _sentence(reference, rows, again),
    }


def _cost(model: Model) -> dict:
    return {
        "name": model.name,
        "seconds_per_step": model.seconds_per_step,
        "peak_bytes": model.peak_bytes,
    }


def _against(reference: Model, other: Model) -> dict:
    pairs = list(zip(reference.samples, other.samples, strict=True))
    count = len(reference.samples[0].steps)
    steps = [_step(pairs, index) for index in range(count)]
    pictures = [(a.picture, b.picture) for a, b in pairs if a.picture is not None]
    return {
        **_cost(other),
        "seeds": len(pairs),
        "identical": all(step["equal"] for step in steps),
        "steps": steps,
        "final": steps[-1],
        "pictures": _pictures(pictures),
        "suspects": suspects(other.rounded),
        "worst_layers": _worst(other.layers),
    }


def _step(samples: list[tuple[Sample, Sample]], index: int) -> dict:
    pairs = [(a.steps[index], b.steps[index]) for a, b in samples]
    sums = [_finite(a, b) for a, b in pairs]
    return {
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "cosine": spread([found and found.cosine for found in sums]),
        "snr_db": spread([found and found.sqnr_db for found in sums]),
    }


def _finite(a: torch.Tensor, b: torch.Tensor) -> Sums | None:
    """Sums over two latents; None where either is not finite."""
    if bool(a.isfinite().all() & b.isfinite().all()):
        return measure(a, b)
    return None


def spread(values: Sequence[float | None]) -> dict:
    """Mean and standard error of what there is: {mean, error, count}."""
    found = [value for value in values if value is not None]
    if not found:
        return {"mean": None, "error": None, "count": 0}
    error = None
    if len(found) > 1:
        error = statistics.stdev(found) / math.sqrt(len(found))
    return {"mean": statistics.fmean(found), "error": error, "count": len(found)}


def _pictures(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> dict | None:
    if not pairs or why_not_metrics():
        return None
    measured = [picture_metrics(a, b) for a, b in pairs]
    found = {}
    for name in METRICS:
        found[name] = spread([row[name] for row in measured])
    return found


def picture_metrics(a: torch.Tensor, b: torch.Tensor) -> dict[str, float | None]:
    """Of (H, W, 3) pictures from 0 to 1, by piq. PSNR is None for equal ones, MS-SSIM for those
    that are too small for its scales.
    """
    import piq

    x, y = (part.float().clamp(0, 1).movedim(-1, 0)[None] for part in (b, a))
    found = {
        "psnr": None,
        "ssim": float(piq.ssim(x, y, data_range=1.0)),
        "ms_ssim": None,
        "haarpsi": float(piq.haarpsi(x, y, data_range=1.0)),
    }
    if not torch.equal(x, y):
        found["psnr"] = float(piq.psnr(x, y, data_range=1.0))
    if min(x.shape[-2:]) >= SMALLEST_MS_SSIM:
        found["ms_ssim"] = float(piq.multi_scale_ssim(x, y, data_range=1.0))
    return found


def _worst(layers: dict[str, float]) -> list[dict]:
    worst = sorted(layers, key=lambda name: -layers[name])[:LISTED]
    return [{"name": name, "rel_l2": layers[name]} for name in worst]


def _rank(row: dict) -> tuple:
    """The closest first."""
    if row["identical"]:
        return (0, 0.0)
    decibels = row["final"]["snr_db"]["mean"]
    if decibels is not None:
        return (1, -decibels)
    return (2, 0.0)


def _sentence(reference: Model, rows: list[dict], control: dict | None) -> str:
    """What a person can do about it, and what another seed makes of the reference."""
    parts = []
    for row in sorted(rows, key=_rank):
        parts.append(f"{row['name']} {_judged(reference, row)}")
    decibels = control and control["final"]["snr_db"]["mean"]
    if decibels is not None:
        parts.append(f"{reference.name} with other seeds has an SNR of {decibels:.1f} dB")
    return ". ".join(parts) + "."


def _judged(reference: Model, row: dict) -> str:
    if row["identical"]:
        return f"is identical to {reference.name}"
    final = row["final"]
    similar, decibels = final["cosine"]["mean"], final["snr_db"]["mean"]
    if similar is None or decibels is None:
        said = "gives NaN or nothing: do not use it"
    else:
        said = f"differs, with an SNR of {decibels:.1f} dB (cosine {similar:.4f})"
        if similar < BROKEN_COSINE:
            said += ": another picture, do not use it"
    pictures = row["pictures"]
    if pictures and pictures["ssim"]["mean"] is not None:
        said += f", SSIM {pictures['ssim']['mean']:.3f}"
    if row["suspects"]:
        named = row["suspects"][0]
        said += f"; its layer {named} in block {block_of(named)} is broken or rounded far more"
        said += " than the others: keep it, or convert again"
    return said


def sheet(reference: Model, others: Sequence[Model], control: Model | None = None) -> torch.Tensor:
    """(H, W, 3): a row per seed, A, then of each other its picture and the amplified difference;
    last the control. Above each picture stands what it is, `caption_height` high.

    Raises:
        ValueError: there are no pictures.
    """
    rows = []
    for index, sample in enumerate(reference.samples):
        tiles = [(reference.name, sample.picture)]
        for other in others:
            tiles += _beside(reference, sample, other.name, other.samples[index])
        rows.append(tiles)
    if control:
        first = reference.samples[0]
        shown = _beside(reference, first, "other seed", control.samples[0])
        rows.append([(reference.name, first.picture), *shown])
    if any(picture is None for _, picture in chain(*rows)):
        raise ValueError("no pictures to show")
    width = max(map(len, rows))
    return torch.cat([_captioned(row, width) for row in rows])


def _beside(
    reference: Model, sample: Sample, name: str, other: Sample
) -> list[tuple[str, torch.Tensor | None]]:
    apart = difference(sample.picture, other.picture)
    return [(name, other.picture), (f"{name} - {reference.name}, x {AMPLIFIED}", apart)]


def _captioned(row: list[tuple[str, torch.Tensor]], width: int) -> torch.Tensor:
    """Pictures side by side under their captions, white up to `width` pictures."""
    from PIL import Image, ImageDraw, ImageFont

    _, first = row[0]
    height, side = first.shape[:2]
    high = caption_height(height)
    strip = Image.new("RGB", (side * width, high), "white")
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(int(LETTERS * high))
    for index, (caption, _) in enumerate(row):
        draw.text((side * index + 4, high // 2), caption, fill="black", font=font, anchor="lm")
    words = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
    words = words.view(high, side * width, 3).to(first.dtype) / 255
    blank = torch.ones((height, side * (width - len(row)), 3), dtype=first.dtype)
    return torch.cat([words, torch.cat([*(picture for _, picture in row), blank], dim=1)])


def caption_height(height: int) -> int:
    """Pixels of the caption above a picture so high."""
    return max(CAPTION, height // CAPTION_PART)


def difference(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """AMPLIFIED x |b - a|, black where equal."""
    if a is None or b is None:
        return None
    return ((b - a).abs() * AMPLIFIED).clamp(0, 1)
