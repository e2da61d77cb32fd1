"""Open a model file of any container, by its suffix."""

from __future__ import annotations

import os
from pathlib import Path

from .gguf_source import SUFFIX, GgufSource
from .reader import FileSource


def open_file(
    path: str | os.PathLike, *, short_lived: bool = False, for_gpu: bool = False
) -> FileSource | GgufSource:
    """A file, an index, a folder of shards, or a GGUF file; a context manager that closes it.

    `short_lived` and `for_gpu` as FileSource defines them.

    Raises:
        CheckpointError: see FileSource and GgufSource.
    """
    if Path(path).suffix.lower() == SUFFIX:
        return GgufSource(path)
    return FileSource(path, short_lived=short_lived, for_gpu=for_gpu)
