"""What a check finds: mistakes by name, one finding each, and the verification of a whole file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain

from ...errors import visible
from ...options import as_json

REPAIR = "fewbits repair"
SHAPES = "fewbits repair, told the shapes of the original"
ORIGINAL = None  # nothing but the original model mends it


@dataclass(frozen=True)
class Mistake:
    """One known way in which a file is wrong.

    Attributes:
        name: a few words, as users read it.
        wrong: what is wrong, in one sentence.
        fix: REPAIR, SHAPES, or ORIGINAL.
        check: what finds it; each text it gives is one finding. None where another step of the
            verification finds it while it does its own work.
    """

    name: str
    wrong: str
    fix: str | None
    check: Callable[..., Iterable[str]] | None = None

    def at(self, layer: str, what: str) -> Finding:
        return Finding(self, layer, what)

    def findings(self, layer: str, *arguments: object) -> list[Finding]:
        """Run the check."""
        return [self.at(layer, what) for what in self.check(*arguments)]


@dataclass(frozen=True)
class Finding:
    """One problem: which mistake, the layer (or tensor, or "" for the file), and what exactly was
    found.
    """

    mistake: Mistake
    layer: str
    what: str

    @property
    def name(self) -> str:
        return self.mistake.name

    @property
    def fix(self) -> str | None:
        return self.mistake.fix

    def to_json(self) -> dict:
        return {
            "id": self.name,
            "layer": self.layer,
            "what": self.what,
            "mistake": self.mistake.wrong,
            "fix": self.fix,
        }

    def to_text(self) -> str:
        said = f"{self.mistake.wrong}: {self.what} [{self.fix or 'needs the original'}]"
        if self.layer:
            said = f"layer '{self.layer}': {said}"
        return f"{self.name}: {said}"


def findings_of(mistakes: Iterable[Mistake], name: str, *about: object) -> list[Finding]:
    """What each mistake's own check finds in a layer."""
    return list(chain.from_iterable(mistake.findings(name, *about) for mistake in mistakes))


@dataclass(frozen=True)
class LayerCheck:
    """One quantized layer: how it is stored, and its error against the original where that is
    known.
    """

    name: str
    dialect: str
    format: str | None
    rel_l2: float | None = None
    nibbles: str | None = None  # "low" | "high" for 4-bit layers of other writers

    @property
    def stored_as(self) -> str:
        """Format and dialect in words."""
        dialect = self.dialect
        if self.nibbles:
            dialect += f", {self.nibbles} nibble first"
        return f"{self.format or 'decoded'} ({dialect})"


@dataclass(frozen=True)
class Verification:
    """What was checked and what was found; `ok` when nothing is wrong."""

    name: str
    layers: tuple[LayerCheck, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings

    def worst(self) -> list[LayerCheck]:
        """Layers with a known error, largest first."""
        measured = (layer for layer in self.layers if layer.rel_l2 is not None)
        return sorted(measured, key=lambda layer: -layer.rel_l2)

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "ok": self.ok,
            "layers": list(map(asdict, self.worst() or self.layers)),
            "findings": as_json(self.findings),
            "warnings": list(self.warnings),
        }

    def to_text(self) -> str:
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.stored_as] = counts.get(layer.stored_as, 0) + 1
        lines = [f"{self.name}: {len(self.layers)} quantized layers"]
        lines += [f"  {count:>5}  {label}" for label, count in counts.items()]
        lines += [f"  {layer.rel_l2:.4f}  {layer.name}" for layer in self.worst()]
        lines += [f"note: {warning}" for warning in self.warnings]
        lines += [finding.to_text() for finding in self.findings] or ["no problems found"]
        return "\n".join(map(visible, lines))
