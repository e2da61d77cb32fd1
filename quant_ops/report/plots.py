"""Pictures of a report, by matplotlib, which is optional: error by depth, the worst layers, sizes,
histograms of layers.

Colours are those of Okabe and Ito, which people with any colour vision tell apart; kinds of layers
differ by their marks as well.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import QuantError
from .histograms import Histogram

WIDTH, HEIGHT, DPI = 10.24, 6.4, 100  # inches: 1024 x 640
# Points; 18 are 10 pixels high in a node of 400, where a picture is 400 wide.
HEADING, TEXT, SMALL = 21, 18, 15
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
MARKS = "osD^vPX"
OTHER = "other layers"
ERROR = "relative error (rel_l2)"
BARS = 12
LAYERS = 3  # layers with histograms
NAME_LENGTH = 34
NARROW = 18  # characters of a name in the legend, of which three columns are as wide as the picture
THEMES = {"light": ("#ffffff", "#222222", "#cccccc"), "dark": ("#1e1e1e", "#eeeeee", "#555555")}
NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Placed:
    """A layer on the axis of depth: its block in the order of the file, and its kind."""

    name: str
    depth: int
    kind: str
    error: float


def why_not_plots() -> str | None:
    """Why no picture can be made here; None when it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed; pictures need it: pip install matplotlib"
    return None


def report_pictures(report: dict, theme: str = "light") -> dict[str, bytes]:
    """Name -> PNG of 1024 x 640 points, from a report's JSON.

    Raises:
        QuantError: matplotlib is missing, or nothing was measured.
    """
    if problem := why_not_plots():
        raise QuantError(problem)
    rows = [row for row in report["layers"] if row.get("rel_l2") is not None]
    if not rows:
        raise QuantError("the report has no measured layer, so there is nothing to draw")
    return {
        "error_by_depth": _drawn(lambda axes, ink: _by_depth(axes, rows, ink), theme),
        "worst_layers": _drawn(lambda axes, ink: _worst(axes, rows, ink), theme),
        "sizes": _drawn(lambda axes, ink: _sizes(axes, report, ink), theme),
    }


def comparison_pictures(tensors: list[dict], theme: str = "light") -> dict[str, bytes]:
    """Name -> PNG of 1024 x 640 points: error by depth, the worst layers.

    Args:
        tensors: of a comparison, as JSON, in the order of the file.

    Raises:
        QuantError: matplotlib is missing, or no weight differs.
    """
    if problem := why_not_plots():
        raise QuantError(problem)
    rows = [
        {
            "name": row["name"].removesuffix(".weight"),
            "format": row["second"],
            "rel_l2": row["rel_l2"],
        }
        for row in tensors
        if row["name"].endswith(".weight") and row["rel_l2"]
    ]
    if not rows:
        raise QuantError("no weight of the two files differs, so there is nothing to draw")
    return {
        "error_by_depth": _drawn(lambda axes, ink: _by_depth(axes, rows, ink), theme),
        "worst_layers": _drawn(lambda axes, ink: _worst(axes, rows, ink), theme),
    }


def histogram_picture(layers: list[Histogram], files: Sequence[str], theme: str = "light") -> bytes:
    """PNG of 1024 x 640 points: weights above, codes below, a column for each of up to `LAYERS`
    layers.

    Args:
        files: what to call those whose weights are drawn.

    Raises:
        QuantError: matplotlib is missing, or there is no layer.
    """
    if problem := why_not_plots():
        raise QuantError(problem)
    if not layers:
        raise QuantError("the file has none of the layers, so there is nothing to draw")
    figure, ink = _figure(theme)
    shown = layers[:LAYERS]
    grid = figure.subplots(2, len(shown), squeeze=False)
    for axes in grid.flat:
        _dressed(axes, theme, labels=SMALL)
        axes.locator_params(axis="x", nbins=3)
        axes.locator_params(axis="y", nbins=4)
    for (above, below), layer in zip(grid.T, shown, strict=True):
        _weights(above, layer, files, ink)
        _codes(below, layer, ink)
    for row, what in zip(grid, ("weights, %", "codes, %"), strict=True):
        row[0].set_ylabel(what, color=ink, fontsize=TEXT)
    figure.suptitle(
        "Weights and codes of the layers with the largest error", color=ink, fontsize=HEADING
    )
    _legend(grid[0, 0], ink)
    return _png(figure)


def _weights(axes, layer: Histogram, files: Sequence[str], ink: str) -> None:
    for row, name, colour, width in zip(
        layer.weights, files, _line_colours(len(files), ink), (4, 1.8), strict=False
    ):
        drawn = axes.stairs(100 * row, layer.edges, color=colour, linewidth=width)
        if axes.get_subplotspec().is_first_col():
            drawn.set_label(name)
    axes.set_ylim(0)
    axes.set_title(_short(layer.name, 24), color=ink, fontsize=SMALL, loc="left")
    axes.set_xlabel("weight, others at the ends", color=ink, fontsize=SMALL)


def _line_colours(count: int, ink: str) -> tuple[str, ...]:
    return ("#999999", COLOURS[1])[-count:]


def _codes(axes, layer: Histogram, ink: str) -> None:
    if layer.codes is None:
        axes.text(0.5, 0.5, f"no codes ({layer.format})", color=ink, fontsize=SMALL, ha="center",
                  transform=axes.transAxes)  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        return
    # An outline: bars of 255 codes are narrower than a pixel apart, and gaps between some of them
    # would look like codes that are not used.
    edges = layer.lowest - 0.5 + np.arange(len(layer.codes) + 1)
    axes.stairs(100 * layer.codes, edges, fill=True, color=COLOURS[5])
    axes.set_title(layer.format, color=ink, fontsize=SMALL, loc="left")
    axes.set_xlabel("code, by its value", color=ink, fontsize=SMALL)


def placed(rows: list[dict]) -> list[Placed]:
    """Where each layer stands: `blocks.3.attn.qkv` is kind `blocks attn.qkv` in the block
    `blocks.3`, `layers.3.experts.11.up` kind `layers experts.*.up` in the block `layers.3`.
    """
    blocks: dict[str, int] = {}
    found = []
    for row in rows:
        block, group = row["name"], ""
        if number := NUMBER.search(block):
            group = block[: number.start()].rpartition(".")[2]
            block = block[: number.end()]
        depth = blocks.setdefault(block, len(blocks))
        rest = "outside of blocks"
        if number:
            rest = re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"][number.end() :]).strip(".")
        found.append(Placed(row["name"], depth, f"{group} {rest}".strip(), row["rel_l2"]))
    return found


def _drawn(draw, theme: str) -> bytes:
    figure, ink = _figure(theme)
    axes = figure.add_subplot()
    _dressed(axes, theme, labels=TEXT)
    draw(axes, ink)
    return _png(figure)


def _figure(theme: str) -> tuple[object, str]:
    """(an empty figure, the colour of its texts)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paper, ink, _ = THEMES[theme]
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor=paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, ink


def _dressed(axes, theme: str, labels: int) -> None:
    paper, ink, faint = THEMES[theme]
    axes.set_facecolor(paper)
    axes.tick_params(colors=ink, labelsize=labels)
    axes.grid(True, color=faint, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)


def _png(figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", facecolor=figure.get_facecolor())
    return data.getvalue()


def _by_depth(axes, rows: list[dict], ink: str) -> None:
    every = placed(rows)
    layers = _worst_of_kind(every)
    worst_of: dict[str, float] = {}
    for layer in layers:
        worst_of[layer.kind] = max(layer.error, worst_of.get(layer.kind, 0.0))
    shown = sorted(worst_of, key=lambda kind: -worst_of[kind])[: len(COLOURS)]
    rest = [layer for layer in layers if layer.kind not in shown]
    if rest:
        _marks(axes, rest, "#999999", ".", label=OTHER)
    for kind, colour, mark in zip(shown, COLOURS, MARKS, strict=False):
        own = [layer for layer in layers if layer.kind == kind]
        _marks(axes, own, colour, mark, label=kind)
    errors = [layer.error for layer in layers if layer.error > 0]
    if errors and max(errors) > 5 * min(errors):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, 1.15 * max(errors, default=1.0))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlim(-0.5, every[-1].depth + 0.5)
    title = "Weight error by depth"
    if len(layers) < len(every):
        title += ", the worst of each kind in each block"
    _titles(axes, title, "block, in the order of the file", ERROR, ink=ink)
    _legend(axes, ink)


def _worst_of_kind(layers: list[Placed]) -> list[Placed]:
    """One layer of each kind in each block: of hundreds of experts the worst."""
    found: dict[tuple[int, str], Placed] = {}
    for layer in layers:
        place = layer.depth, layer.kind
        if place not in found or layer.error > found[place].error:
            found[place] = layer
    return list(found.values())


def _marks(axes, layers: list[Placed], colour: str, mark: str, label: str) -> None:
    depths = [layer.depth for layer in layers]
    errors = [layer.error for layer in layers]
    axes.plot(
        depths,
        errors,
        linestyle="none",
        marker=mark,
        markersize=9,
        markerfacecolor="none",  # marks on top of each other stay visible
        markeredgewidth=2,
        color=colour,
        label=_short(label),
    )


def _worst(axes, rows: list[dict], ink: str) -> None:
    worst = sorted(rows, key=lambda row: row["rel_l2"], reverse=True)[:BARS][::-1]
    formats = list(dict.fromkeys(row["format"] for row in worst))
    for at, row in enumerate(worst):
        colour = COLOURS[formats.index(row["format"]) % len(COLOURS)]
        axes.barh(at, row["rel_l2"], color=colour)
        axes.text(
            row["rel_l2"], at, f" {row['rel_l2']:.4f}", va="center", color=ink, fontsize=SMALL
        )
    axes.set_yticks(range(len(worst)), [_short(row["name"]) for row in worst])
    axes.grid(False, axis="y")
    axes.margins(x=0.15)
    title = f"The {len(worst)} layers with the largest error"
    if len(worst) == 1:
        title = "The only layer with an error"
    _titles(axes, title, ERROR, "", ink=ink)
    for format in formats:
        axes.barh(0, 0, color=COLOURS[formats.index(format) % len(COLOURS)], label=format)
    _legend(axes, ink)


def _sizes(axes, report: dict, ink: str) -> None:
    rows = [row for row in report["summary"] if row["bytes_before"]][::-1]
    labels = {"before": "before", "after": "after"}
    largest = max((row["bytes_before"] for row in rows), default=0)
    unit, size = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    for at, row in enumerate(rows):
        before, after = row["bytes_before"] / size, row["bytes_after"] / size
        axes.barh(at + 0.2, before, 0.38, color="#999999", label=labels.pop("before", None))
        axes.barh(at - 0.2, after, 0.38, color=COLOURS[0], label=labels.pop("after", None))
        note = f" {after:.3g} {unit}"
        if row.get("rel_l2"):
            note += f", error {row['rel_l2']:.4f}"
        axes.text(after, at - 0.2, note, va="center", color=ink, fontsize=SMALL)
    axes.set_yticks(range(len(rows)), [f"{row['format']} ({row['layers']})" for row in rows])
    axes.grid(False, axis="y")
    axes.margins(x=0.3)
    _titles(axes, "Bytes by format (layers)", unit, "", ink=ink)
    _legend(axes, ink)


def _titles(axes, title: str, x: str, y: str, ink: str) -> None:
    axes.set_title(title, color=ink, fontsize=HEADING, loc="left")
    axes.set_xlabel(x, color=ink, fontsize=TEXT)
    axes.set_ylabel(y, color=ink, fontsize=TEXT)


def _legend(axes, ink: str) -> None:
    _, names = axes.get_legend_handles_labels()
    columns = 3 if all(len(name) <= NARROW for name in names) else 2
    legend = axes.figure.legend(
        loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False, handletextpad=0.4
    )
    for text in legend.get_texts():
        text.set_color(ink)


def _short(name: str, length: int = NAME_LENGTH) -> str:
    """The end of a name; of a layer in a block the block as well, without its group."""
    if len(name) <= length:
        return name
    number, start = NUMBER.search(name), "…"
    if number and number.start(1) <= len(name) - length:
        start = f"{number[1]}…"
    return start + name[len(start) - length :]
