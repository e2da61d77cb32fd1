"""verify_file: decode and check every layer; and the problems that every door shows alike."""

from __future__ import annotations

import os
from dataclasses import replace

from ..checkpoint.reader import FileSource
from ..checkpoint.verify import Finding, Mistake, Verification, verify_source
from ..checkpoint.verify.findings import ORIGINAL
from ..planning.model_family import find_parts
from ..sources import TensorSource

FOREIGN_NAMES = Mistake(
    "foreign-names", "layers have names or a place that ComfyUI does not read quantized", ORIGINAL
)


def verify_file(path: str | os.PathLike, against: str | os.PathLike | None = None) -> Verification:
    """Decode and check every layer of a file; with the original also the error of each.

    Raises:
        CheckpointError: the container itself cannot be read.
    """
    with FileSource(path) as source:
        if against is None:
            return verify(source)
        with FileSource(against) as original:
            return verify(source, original)


def verify(source: TensorSource, original: TensorSource | None = None) -> Verification:
    """`verify_source`, and what the names of the whole model say."""
    found = verify_source(source, original)
    if not found.layers:
        return found
    return replace(found, findings=(*found.findings, *_name_findings(source)))


def _name_findings(source: TensorSource) -> list[Finding]:
    """Quantized layers under names that ComfyUI renames while loading, or leaves unread."""
    parts = find_parts(source.header.tensors)
    refused = [part.family for part in parts if part.family.kind == "refuse"]
    return [FOREIGN_NAMES.at("", f"{family.title}: {family.why}") for family in refused]
