"""A report as Markdown, from its JSON: also one that was read from a file."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import visible
from .report import megabytes

WORST = 20  # rows of the table of layers
FORMATS = ("format", "layers", "before", "after", "rel_l2", "SQNR")
LAYERS = ("layer", "format", "rel_l2", "SQNR", "cosine", "full codes", "largest error", "x nearest")


def to_markdown(report: dict) -> str:
    """The whole report as Markdown; of the layers the worst, first the very worst."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict) -> Iterator[str]:
    yield f"# {_cell(report.get('file') or report['family'])}"
    yield ""
    before, after = report["bytes_before"], report["bytes_after"]
    sizes = f"{megabytes(before)} → {megabytes(after)}"
    if report.get("source"):
        sizes = f"{_cell(report['source'])}: {sizes}"
    if before:
        sizes += f" ({100 * after / before:.1f} %)"
    yield f"{sizes}; {report['loads_in']}."
    yield ""
    yield f"Weight error (rel_l2) {report['rel_l2']:.4f}: {report['meaning']}."
    yield ""
    yield from _table(FORMATS, (_format_row(row) for row in report["summary"]))
    yield ""
    measured = [row for row in report["layers"] if row.get("rel_l2") is not None]
    worst = sorted(measured, key=lambda row: row["rel_l2"], reverse=True)[:WORST]
    yield f"The worst {len(worst)} of {len(measured)} layers:"
    yield ""
    titles = LAYERS
    if any("output_error" in row for row in worst):
        titles = (*LAYERS, "output error")
    yield from _table(titles, (_layer_row(row)[: len(titles)] for row in worst))
    if patches := report.get("patches"):
        yield ""
        yield f"{_cell(patches['meaning'])}."
    for warning in report.get("warnings", ()):
        yield ""
        yield f"Note: {_cell(warning)}"


def _table(titles: tuple[str, ...], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _format_row(row: dict) -> list[str]:
    sizes = megabytes(row["bytes_before"]), megabytes(row["bytes_after"])
    error = row.get("rel_l2")
    return [
        _cell(row["format"]),
        str(row["layers"]),
        *sizes,
        _number(error, ".4f"),
        _decibels(row.get("sqnr_db")),
    ]


def _layer_row(row: dict) -> list[str]:
    compared = row.get("against_nearest") or {}
    output = _number(row.get("output_error"), ".4f")
    if row.get("output_seen"):
        output += " (seen)"
    return [
        f"`{_cell(row['name'])}`",
        _cell(row["format"]),
        _number(row["rel_l2"], ".4f"),
        _decibels(row.get("sqnr_db")),
        _number(row.get("cosine"), ".6f"),
        _number(row.get("saturated"), ".2%"),
        _number(row.get("largest_error"), ".3g"),
        _number(compared.get("rel_l2"), ".3f"),
        output,
    ]


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form)


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} dB"


def _cell(text: object) -> str:
    return visible(str(text)).replace("|", "\\|").replace("`", "'")
