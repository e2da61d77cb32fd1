"""The picture of README.md: error of the emoji model's denoiser by size of the file, from tests/benchmarks/results/fit.csv.

    PYTHONPATH=tests/import_shim:tests python -m support.harness.pareto

Colours are those of Okabe and Ito; ways differ by their marks as well.
"""

from __future__ import annotations

import csv
from pathlib import Path

from .emoji import ROOT

RESULTS = ROOT / "tests" / "benchmarks" / "results" / "fit.csv"
PICTURES = {
    theme: ROOT / "docs" / "images" / f"fit{mark}.png"
    for theme, mark in (("light", ""), ("dark", "_dark"))
}
THEMES = {  # paper, texts, names of formats, grid, uniform formats
    "light": ("white", "black", "#444444", "#dddddd", "#777777"),
    "dark": ("#0d1117", "#eeeeee", "#bbbbbb", "#30363d", "#999999"),
}
WAYS = {  # way -> what the picture calls it, colour, mark
    "calibrated fit": ("fit, calibrated", "#0072B2", "o"),
    "fit": ("fit, no calibration", "#56B4E9", "s"),
    "threshold": ("one threshold for all layers", "#E69F00", "^"),
    "gradient": ("scores from gradients", "#CC79A7", "v"),
}
NAMED = {  # uniform formats that the picture names: label -> where the name stands, in points
    "bnb_nf4:block_size=256,method=mse_clip, preset none": (-52, -14),
    "asym_w4a8_int8, preset auto": (8, 5),
    "nvfp4, preset auto": (8, 2),
    "float8_e4m3fn, preset auto": (-4, 9),
    "int8_tensorwise:convrot=true, preset auto": (-112, -14),
    "int8_lodewise:block_size=32, preset auto": (-30, -16),
}


def rows() -> list[dict]:
    """What was measured, with numbers as numbers."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    for row in found:
        row["bytes"], row["error"] = int(row["bytes"]), float(row["error"])
        row["share"] = float(row["share"])
        row["target"] = int(row["target"]) if row["target"] else None
    return found


def best_uniform(target: int) -> dict:
    """The uniform file with the least error that fits."""
    fitting = [row for row in rows() if row["way"] == "uniform" and row["share"] <= target]
    return min(fitting, key=lambda row: row["error"])


def frontier() -> list[dict]:
    """The uniform files that no smaller one beats, by size."""
    found: list[dict] = []
    uniform = [row for row in rows() if row["way"] == "uniform"]
    for row in sorted(uniform, key=lambda row: (row["bytes"], row["error"])):
        if not found or row["error"] < found[-1]["error"]:
            found.append(row)
    return found


def draw(path: Path, theme: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paper, ink, soft, lines, plain = THEMES[theme]
    figure = Figure(figsize=(9, 5.4), dpi=110, facecolor=paper, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=paper)
    axes.tick_params(colors=ink, labelsize=11)
    uniform = [row for row in rows() if row["way"] == "uniform"]
    axes.plot(*points(uniform), "x", color=plain, markersize=6, label="one format for all layers")
    best = frontier()
    axes.step(*points(best), where="post", color=plain, linewidth=1.2)
    for row in uniform:
        if row["label"] in NAMED:
            name = row["label"].partition(", preset")[0].replace(",method=mse_clip", "")
            name = name.replace(":block_size=", ", ").replace(":convrot=true", ", ConvRot")
            axes.annotate(name, (row["share"], row["error"]), NAMED[row["label"]],
                          textcoords="offset points", fontsize=9, color=soft)  # fmt: skip
    for way, (label, colour, mark) in WAYS.items():
        chosen = sorted((row for row in rows() if row["way"] == way), key=lambda row: row["share"])
        look = {"marker": mark, "color": colour, "markersize": 10, "linestyle": "none"}
        axes.plot(*points(chosen), label=label, **look)
    axes.set_yscale("log")
    axes.set_xlim(24, 67)
    axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()
    axes.set_xlabel("size of the file, % of bf16", fontsize=12, color=ink)
    axes.set_ylabel("error of the denoiser, relative", fontsize=12, color=ink)
    axes.set_title(
        "A format for every layer against one for all", loc="left", fontsize=14, color=ink
    )
    axes.grid(True, color=lines, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    axes.legend(frameon=False, fontsize=11, labelcolor=ink)
    figure.savefig(path, format="png", facecolor=paper)


def points(found: list[dict]) -> tuple[list[float], list[float]]:
    return [row["share"] for row in found], [row["error"] for row in found]


if __name__ == "__main__":
    for theme, path in PICTURES.items():
        draw(path, theme)
