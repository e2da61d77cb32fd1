"""Report: the plan, the measured error of every quantized layer, and how long it took; JSON first,
text from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import visible
from ..options import stated
from ..spec import ModelPlan
from ..version import VERSION
from .layer import LayerResult, decibels, relative
from .words import in_words, patches_in_words

WORST = 5  # layers named in the text
UNMEASURED = {"rel_l2": None, "sqnr_db": None}


@dataclass(frozen=True)
class Report:
    """Result of one conversion. `seconds` is wall time."""

    plan: ModelPlan
    results: tuple[LayerResult, ...]
    seconds: float
    device: str
    # layers that had another format before; their errors are against that one's values
    rounded_twice: tuple[str, ...] = ()

    def worst(self, count: int = WORST) -> list[LayerResult]:
        return sorted(self.results, key=lambda result: -result.rel_l2)[:count]

    def rel_l2(self, format: str | None = None) -> float | None:
        """Relative error of all quantized weights together, or of those of one format; then None
        where none was measured.
        """
        results = [result for result in self.results if format in (None, result.format)]
        if format and not results:
            return None
        return _rel_l2(results)

    def to_json(self) -> dict:
        plan = self.plan.to_json()
        measured = {result.name: result.to_json() for result in self.results}
        for row in plan["layers"]:
            row.update(measured.get(row["name"], UNMEASURED))
        for row in plan["summary"]:
            error = self.rel_l2(row["format"])
            row["rel_l2"], row["sqnr_db"] = error, decibels(error)
        return {
            "fewbits": VERSION,
            **plan,
            "rel_l2": self.rel_l2(),
            "meaning": in_words(self.rel_l2()),
            "worst": list(map(_row, self.worst())),
            "seconds": self.seconds,
            "device": self.device,
            "rounded_twice": list(self.rounded_twice),
            **stated(patches=self.patches()),
        }

    def patches(self) -> dict | None:
        """What is left of LoRAs that were baked in, over all layers that have one; None without."""
        found = [result for result in self.results if result.retention]
        if not found:
            return None
        drowned = [result.name for result in found if result.retention.drowned]
        return {
            "layers": len(found),
            "survived": statistics.median(result.retention.survived for result in found),
            "kept": statistics.median(result.retention.kept for result in found),
            "noise": statistics.median(result.retention.noise for result in found),
            "drowned": drowned,
            "meaning": patches_in_words([result.retention for result in found]),
        }

    def to_text(self) -> str:
        """A few lines for a terminal or a text node."""
        lines = [
            *plan_lines(self.plan),
            f"weight error (rel_l2) {self.rel_l2():.4f}, {self.seconds:.1f} s on {self.device}",
        ]
        if self.results:
            lines.append(in_words(self.rel_l2()))
        if patches := self.patches():
            lines.append(patches["meaning"])
        lines += self._method_lines()
        if self.results:
            lines.append("largest errors:")
            lines += map(_worst_line, self.worst())
        return "\n".join(map(visible, lines))

    def _method_lines(self) -> list[str]:
        """One line per method that is compared with nearest: medians over its layers."""
        compared = [
            (result, result.against_nearest) for result in self.results if result.against_nearest
        ]
        lines = []
        for method in sorted({result.method for result, _ in compared}):
            rows = [row for result, row in compared if result.method == method]
            objective = statistics.median(row["objective"] for row in rows)
            error = statistics.median(row["rel_l2"] for row in rows)
            kept = sum(row["stored"] == "nearest" for row in rows)
            lines.append(
                f"{method} against nearest, median of {len(rows)} layers: objective "
                f"{objective:.3f} x, weight error {error:.3f} x; nearest was stored for {kept}"
            )
        return lines


def _row(result: LayerResult) -> dict:
    names = ("name", "format", "rel_l2", "sqnr_db")
    return {name: getattr(result, name) for name in names}


def _worst_line(result: LayerResult) -> str:
    line = f"  {result.rel_l2:.4f}  {result.name}"
    if result.output:
        line += f", of its outputs {result.output.relative:.4f}"
    return line


def _rel_l2(results: Iterable[LayerResult]) -> float:
    """Relative error of several weights together; 0 where they are all zero."""
    error, signal = 0.0, 0.0
    for result in results:
        error += result.deviation.error
        signal += result.deviation.signal
    return relative(error, signal)


def plan_lines(plan: ModelPlan) -> list[str]:
    """The plan's totals as text: one line per format, then size and where it loads."""
    lines = [f"{'format':<24} {'layers':>6} {'before':>10} {'after':>10}"]
    for row in plan.summary():
        before, after = megabytes(row["bytes_before"]), megabytes(row["bytes_after"])
        lines.append(f"{row['format']:<24} {row['layers']:>6} {before:>10} {after:>10}")
    lines.append(
        f"{'total':<24} {'':>6} {megabytes(plan.bytes_before):>10} "
        f"{megabytes(plan.bytes_after):>10}"
    )
    lines.append(f"family {plan.family_title or plan.family}; {plan.loads_in()}")
    lines += [f"note: {warning}" for warning in plan.warnings]
    return list(map(visible, lines))


def layer_lines(plan: ModelPlan) -> list[str]:
    """What becomes of every layer and why, then the rules in order with what each matched."""
    lines = []
    for layer in plan.layers:
        if layer.is_layer:
            label, size = layer.format or layer.action, megabytes(layer.bytes_after)
            lines.append(
                f"{label:<24} {layer.method or '':<8} {size:>10}  {layer.name}  [{layer.reason}]"
            )
    lines += [
        "",
        "rules, in order; the first that matches a layer decides (decided / matched layers):",
    ]
    for rule in plan.rules:
        line = f"{rule.won:>6} / {rule.matched:<6} {rule.action:<9} {rule.rule}"
        if not rule.matched:
            line += "  (matched nothing)"
        lines.append(line)
    return list(map(visible, lines))


def megabytes(count: int) -> str:
    """Bytes for people, decimal units as file managers show them."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB"
