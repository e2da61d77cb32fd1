"""The layer-config template: one entry to fill in per layer that can be quantized."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..checkpoint.reader import FileSource
from ..errors import CheckpointError
from ..files import refuse_as_output
from ..part import write_whole
from ..spec import Header
from .layer_config import DEFAULT, EXCLUSIONS
from .planner import not_a_candidate


def template_text(header: Header) -> str:
    """The template of a model, keys in file order; fed back unedited it is refused, naming the
    empty formats.
    """
    table: dict[str, object] = {DEFAULT: {"format": ""}, EXCLUSIONS: []}
    for spec in header.tensors.values():
        if not not_a_candidate(spec):
            table[spec.name.removesuffix(".weight")] = {"format": "", "_shape": list(spec.shape)}
    return json.dumps(table, indent=2) + "\n"


def template_path(source: Path) -> Path:
    """`<input path without its last extension>_layer_config_template.json`."""
    stem = os.path.splitext(os.fspath(source).rstrip("/\\"))[0]
    return Path(f"{stem}_layer_config_template.json")


def write_template(source: Path, *, overwrite: bool = False) -> Path:
    """Write the template of a model file beside it; returns its path.

    Raises:
        CheckpointError: the model cannot be read, or the template exists or cannot be written.
    """
    path = template_path(source)
    with FileSource(source) as opened:
        text = template_text(opened.header)
        refuse_as_output(opened.files, path)
    if os.path.lexists(path) and not overwrite:
        raise CheckpointError(
            f"{path} exists already; allow overwriting to replace it", option="overwrite"
        )
    try:
        write_whole(path, text.encode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    return path
