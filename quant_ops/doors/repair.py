"""repair_file: a copy in which everything is mended that can be without the original, and what was
done.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.importers import ImportOptions
from ..checkpoint.importers.source import ImportedSource, refuse_unexplained
from ..checkpoint.reader import FileSource
from ..checkpoint.verify import SCALE_BROKEN, UNREPAIRABLE, Finding, Verification
from ..checkpoint.writer import check_target
from ..errors import visible
from ..options import as_json
from ..pipeline import ProgressFn, ignore_progress, rewrite
from .problems import checked_sink
from .verify import verify as verification


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
            "fixed": as_json(self.fixed),
            "left": as_json(self.left),
            "origins": self.origins,
        }

    def to_text(self) -> str:
        lines = [f"{self.name}: {len(self.fixed)} problems fixed, {len(self.left)} left"]
        lines += [f"  {count:>5} layers  {origin}" for origin, count in self.origins.items()]
        lines += [f"fixed {finding.to_text()}" for finding in self.fixed]
        lines += [f"left  {finding.to_text()}" for finding in self.left]
        return "\n".join(map(visible, lines))


def repair_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    options: ImportOptions | None = None,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: ProgressFn = ignore_progress,
) -> Repair:
    """Write a copy in which everything is fixed that can be fixed without the original, and say
    what was done.

    A layer whose codes or scales are damaged stays as it is stored, and is told: with a made-up
    scale ComfyUI would run and be wrong.

    Args:
        verify: before the file gets its name, decode every other layer by the reference decoder
            too.

    Raises:
        CheckpointError: a layer that cannot be read without guessing, or a copy that would have
            problems of its own; nothing is written.
    """
    check_target(Path(target), overwrite)
    with FileSource(source) as file:
        before = verification(file)
        broken = [finding for finding in before.findings if finding.mistake in UNREPAIRABLE]
        left = frozenset(finding.layer for finding in broken if finding.mistake is not SCALE_BROKEN)
        sink = checked_sink(target, overwrite=overwrite, known=before.findings, verify=verify)
        options = replace(options or ImportOptions(), left=left)
        with closing(ImportedSource(file, options)) as opened:
            refuse_unexplained(file.name, opened.contents)
            rewrite(opened, sink, on_progress=on_progress)
            origins = opened.origins()
    with FileSource(Path(target)) as written:
        return _repaired(before, verification(written), origins)


def _repaired(before: Verification, after: Verification, origins: dict[str, int]) -> Repair:
    """Compare two verifications of a file, before and after it was rewritten in canonical form."""
    remaining = {(finding.name, finding.layer) for finding in after.findings}
    fixed = tuple(
        finding for finding in before.findings if (finding.name, finding.layer) not in remaining
    )
    return Repair(before.name, fixed, after.findings, origins)
