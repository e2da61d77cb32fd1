"""Report: the plan, the measured error of every quantized layer, and how long it took; JSON first,
text from it.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from ..errors import visible
from ..spec import ModelPlan
from ..version import VERSION

WORST = 5  # layers named in the text


@dataclass(frozen=True)
class LayerResult:
    """Measured on the stored codes: sums over all elements of (dec - w)^2 and w^2.

    A method other than nearest also has its own objective, and both numbers for nearest; `verdict`
    says why nearest was stored in its place, empty when it was not. `moved_to_cpu`: the device
    had too little memory for it.
    """

    name: str
    format: str
    method: str
    squared_error: float
    squared_weight: float
    squared_error_nearest: float | None = None
    objective: float | None = None
    objective_nearest: float | None = None
    verdict: str = ""
    moved_to_cpu: bool = False

    @property
    def rel_l2(self) -> float:
        """||dec - w|| / ||w||; 0 for an all-zero weight."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0

    @property
    def against_nearest(self) -> dict | None:
        """This method's weight error and objective, x nearest's; None for nearest itself, 1.0 where
        both are zero.
        """
        if self.objective is None:
            return None
        error = _ratio(self.squared_error, self.squared_error_nearest)
        return {
            "rel_l2": math.sqrt(error),
            "objective": _ratio(self.objective, self.objective_nearest),
            "stored": "nearest" if self.verdict else self.method,
            "verdict": self.verdict,
        }

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise in dB; None when there is no error at all."""
        return -20.0 * math.log10(self.rel_l2) if self.rel_l2 else None


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

    def rel_l2(self) -> float:
        """Relative error of all quantized weights together."""
        signal = sum(result.squared_weight for result in self.results)
        return (
            math.sqrt(sum(result.squared_error for result in self.results) / signal)
            if signal
            else 0.0
        )

    def to_json(self) -> dict:
        plan = self.plan.to_json()
        measured = {result.name: result for result in self.results}
        for row in plan["layers"]:
            result = measured.get(row["name"])
            row["rel_l2"] = result and result.rel_l2
            row["sqnr_db"] = result and result.sqnr_db
            if result and result.against_nearest:
                row["against_nearest"] = result.against_nearest
        return {
            "fewbits": VERSION,
            **plan,
            "rel_l2": self.rel_l2(),
            "worst": [
                {"name": r.name, "format": r.format, "rel_l2": r.rel_l2, "sqnr_db": r.sqnr_db}
                for r in self.worst()
            ],
            "seconds": self.seconds,
            "device": self.device,
            "rounded_twice": list(self.rounded_twice),
        }

    def to_text(self) -> str:
        """A few lines for a terminal or a text node."""
        lines = [
            *plan_lines(self.plan),
            f"weight error (rel_l2) {self.rel_l2():.4f}, {self.seconds:.1f} s on {self.device}",
        ]
        lines += self._method_lines()
        if self.results:
            lines.append("largest errors:")
            lines += [f"  {result.rel_l2:.4f}  {result.name}" for result in self.worst()]
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


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else 1.0


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
    return [visible(line) for line in lines]


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
        unmatched = "" if rule.matched else "  (matched nothing)"
        lines.append(f"{rule.won:>6} / {rule.matched:<6} {rule.action:<9} {rule.rule}{unmatched}")
    return [visible(line) for line in lines]


def megabytes(count: int) -> str:
    """Bytes for people, decimal units as file managers show them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
