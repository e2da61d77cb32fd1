"""What a repair did: problems before and after, and which layers were rewritten. The work is the
importers'.
"""

from __future__ import annotations

from dataclasses import dataclass

from .verify import Finding, Verification


@dataclass(frozen=True)
class Repair:
    """`fixed` are problems of the input that the output does not have, `left` those it still
    has.
    """

    name: str
    fixed: tuple[Finding, ...]
    left: tuple[Finding, ...]
    origins: dict[str, int]

    def to_json(self) -> dict:
        return {
            "name": self.name,
            "fixed": [finding.to_json() for finding in self.fixed],
            "left": [finding.to_json() for finding in self.left],
            "origins": self.origins,
        }

    def to_text(self) -> str:
        lines = [f"{self.name}: {len(self.fixed)} problems fixed, {len(self.left)} left"]
        lines += [f"  {count:>5} layers  {origin}" for origin, count in self.origins.items()]
        lines += [f"fixed {finding.to_text()}" for finding in self.fixed]
        lines += [f"left  {finding.to_text()}" for finding in self.left]
        return "\n".join(lines)


def repaired(before: Verification, after: Verification, origins: dict[str, int]) -> Repair:
    """Compare two verifications of a file, before and after it was rewritten in canonical form."""
    remaining = {(finding.id, finding.layer) for finding in after.findings}
    fixed = tuple(
        finding for finding in before.findings if (finding.id, finding.layer) not in remaining
    )
    return Repair(before.name, fixed, after.findings, origins)
