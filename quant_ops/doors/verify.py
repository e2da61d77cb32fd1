"""verify_file: decode and check every layer of a file."""

from __future__ import annotations

import os
from dataclasses import replace

from ..checkpoint.reader import FileSource
from ..checkpoint.verify import Verification, verify_source
from ..sources import TensorSource
from .problems import name_findings


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
    return replace(found, findings=(*found.findings, *name_findings(source)))
