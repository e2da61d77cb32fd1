"""What is wrong with a file as far as it shows without reading weights: one answer for every door,
and the last look at what was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.diffusers import names_of
from ..checkpoint.importers.source import is_side
from ..checkpoint.reader import FileSource
from ..checkpoint.second_reading import (
    refuse_other_markers,
    refuse_other_norms,
    refuse_other_reading,
)
from ..checkpoint.verify import UNREPAIRABLE, Finding, Mistake, stored_findings
from ..checkpoint.verify.findings import ORIGINAL
from ..checkpoint.writer import FileSink
from ..errors import CheckpointError
from ..planning.model_family import find_parts, owner_of, why_misplaced
from ..report.file import forget_report
from ..sources import Norms, TensorSource

VERIFY = "FEWBITS_VERIFY"
CONVERT = "fewbits convert"
FOREIGN_NAMES = Mistake(
    "foreign-names", "layers have names or a place that ComfyUI does not read quantized", ORIGINAL
)
DIFFUSERS_NAMES = Mistake(
    FOREIGN_NAMES.name,
    "layers have diffusers' names, which ComfyUI renames without their scales",
    CONVERT,
)
MISPLACED = Mistake(
    "names-misplaced", "ComfyUI does not find the model under these names", ORIGINAL
)


def problems(source: TensorSource) -> list[Finding]:
    """Findings from names, shapes, dtypes, JSON, scales and samples of codes."""
    return [*stored_findings(source), *name_findings(source)]


def name_findings(source: TensorSource) -> list[Finding]:
    """Quantized layers under names that ComfyUI renames while loading, or leaves unread."""
    quantized = [name for name in source.header.tensors if is_side(name)]
    if not quantized:
        return []
    parts = find_parts(source.header.tensors)
    holding = {owner_of(name, parts) for name in quantized}
    refused = [
        part.family
        for part in parts
        if part in holding and part.family.kind == "refuse" and not part.family.quantized_since
    ]
    mistake = FOREIGN_NAMES if names_of(source.header.tensors) is None else DIFFUSERS_NAMES
    found = [mistake.at("", f"{family.title}: {family.why}") for family in refused]
    misplaced = why_misplaced(source.header.tensors, parts)
    return [*found, *([MISPLACED.at("", misplaced)] if misplaced else [])]


def hides_contents(finding: Finding) -> bool:
    """Whether nothing can be said of a file with this problem, as ComfyUI would not read it."""
    return finding.fix is None or finding.mistake is DIFFUSERS_NAMES


def mendable(source: TensorSource) -> list[Finding]:
    """The problems of an input that a copy of it may have too: ComfyUI opens it all the same."""
    return [finding for finding in problems(source) if finding.fix is not None]


def checked_sink(
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    known: Iterable[Finding] = (),
    verify: bool = False,
) -> FileSink:
    """A FileSink whose finished file is opened once more before it appears under its name.

    Args:
        known: problems that it may have, because its source has them and they were told.
        verify: decode every layer of the finished file by the reference decoder too; always done
            where the environment says FEWBITS_VERIFY=1.

    Raises:
        CheckpointError: see FileSink; and at the end any other problem, then nothing was written.
    """
    known = tuple(known)
    allowed = {(finding.name, finding.layer) for finding in known}
    undecoded = {finding.layer for finding in known if finding.mistake in UNREPAIRABLE}

    whole = verify or os.environ.get(VERIFY) == "1"

    def check(written: Path, norms: Norms) -> None:
        with FileSource(written) as source:
            found = [
                finding
                for finding in problems(source)
                if (finding.name, finding.layer) not in allowed
            ]
            if not found:
                refuse_other_markers(source)
        if found:
            raise CheckpointError(
                f"the finished file has {len(found)} problems, so it was not kept: "
                f"{found[0].to_text()}"
            )
        refuse_other_norms(written, norms, every=whole)
        if whole:
            refuse_other_reading(written, besides=undecoded)

    return FileSink(
        target,
        overwrite=overwrite,
        check=check,
        whole=whole,
        replacing=lambda: forget_report(Path(target)),
    )
