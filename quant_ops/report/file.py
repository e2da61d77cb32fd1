"""The report that lies beside a model: `<name>.fewbits.json`.

It holds no path and no user's name, only those of the two files: models are handed on. Whatever
goes wrong with it, the model stays.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from ..errors import CheckpointError
from ..part import write_whole
from ..spec import compact_json
from .report import Report

SUFFIX = ".fewbits.json"
KIND = "conversion"  # says that a file is ours, and which of ours
LARGEST = 1 << 26  # bytes that are read of a report; one of 6,000 layers has 3 MB


def report_path(model: Path) -> Path:
    """Where the report of a model lies: beside it, under its name."""
    return model.with_name(model.name.removesuffix(".safetensors") + SUFFIX)


def report_text(report: Report, model: Path, source: str) -> str:
    """The JSON that is written: a line per layer, so that thousands stay readable and small."""
    data = {"kind": KIND, "file": model.name, "source": source, **report.to_json()}
    layers = data.pop("layers")
    head = json.dumps(data, indent=1, ensure_ascii=False)
    rows = ",\n  ".join(compact_json(_told(row)) for row in layers)
    return f'{head[:-2]},\n "layers": [\n  {rows}\n ]\n}}\n'


def _told(row: dict) -> dict:
    """A layer's row without what says nothing."""
    return {name: value for name, value in row.items() if value not in (None, "", [], {})}


def write_report(report: Report, model: Path, source: str) -> tuple[Path | None, str]:
    """Write the report beside a model that is complete; an older report of that name is replaced.

    Returns:
        The file, or None and why there is none: something else has its name, or the disk does not
        take it.
    """
    path = report_path(model)
    if os.path.lexists(path) and not is_report(path):
        return None, f"no report was written: {path.name} exists and is not a report of FewBits"
    try:
        write_whole(path, report_text(report, model, source).encode("utf-8", "backslashreplace"))
    except OSError as error:
        return None, f"no report was written: {path.name}: {error.strerror or error}"
    return path, ""


def forget_report(model: Path) -> None:
    """Remove the report of a model that is about to be replaced: a process that is killed between
    the two leaves a model without a report, never one with another's.
    """
    path = report_path(model)
    if is_report(path):
        with contextlib.suppress(OSError):
            path.unlink()


def is_report(path: Path) -> bool:
    """Whether a file is a report of ours; links are not followed."""
    try:
        read_report(path)
    except CheckpointError:
        return False
    return True


def read_report(path: Path) -> dict:
    """The JSON of a report.

    Raises:
        CheckpointError: not a report of FewBits.
    """
    refusal = CheckpointError(f"{path.name}: not a report of FewBits")
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST:
            raise refusal
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise refusal from None
    if not isinstance(data, dict) or data.get("kind") != KIND or "fewbits" not in data:
        raise refusal
    return data
