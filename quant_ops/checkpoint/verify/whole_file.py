"""Mistakes of the file as a whole: its header, its markers, tensors that belong to nothing."""

from __future__ import annotations

from collections.abc import Iterable

from ..importers.source import Contents, unexplained
from .findings import ORIGINAL, REPAIR, Finding, Mistake, findings_of

NAMED = 3  # names that one finding lists


def _prefixed_markers(contents: Contents) -> Iterable[str]:
    return (f"'{key}'" for key, prefix in contents.scopes.items() if prefix)


def _orphans(contents: Contents) -> Iterable[str]:
    return (f"'{spec.name}'" for spec in contents.orphans)


def _unexplained(contents: Contents) -> Iterable[str]:
    found = unexplained(contents)
    if found:
        yield f"{len(found)} tensors ({', '.join(found[:NAMED])})"


def _header(contents: Contents) -> Iterable[str]:
    if contents.header_problem:
        yield contents.header_problem
    if contents.unresolved:
        names = ", ".join(contents.unresolved[:NAMED])
        yield f"{len(contents.unresolved)} names without a weight ({names})"
    if contents.missing_prefix:
        yield f"names lack the prefix '{contents.missing_prefix}'"


METADATA_LOST = Mistake("metadata-lost", "metadata of the original is missing", ORIGINAL)

WHOLE_FILE = (
    Mistake(
        "codes-unexplained",
        "codes of a format that is not read; as numbers they are noise",
        ORIGINAL,
        _unexplained,
    ),
    Mistake(
        "marker-prefixed",
        "a scaled_fp8 marker under a prefix: loaders look for one prefix only",
        REPAIR,
        _prefixed_markers,
    ),
    Mistake("orphan-side-tensor", "a side tensor without its weight", REPAIR, _orphans),
    Mistake(
        "header-unresolved",
        "the file header names layers that do not exist, or cannot be read",
        REPAIR,
        _header,
    ),
)


def file_findings(contents: Contents) -> list[Finding]:
    return findings_of(WHOLE_FILE, "", contents)
