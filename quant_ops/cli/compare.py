"""`fewbits compare A B`: how far the weights of one file are from another's, in any formats."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..doors import compare_files
from ..errors import CheckpointError
from ..part import write_whole
from ..report.plots import comparison_pictures
from .door import say
from .progress import progress_bar


def run(args: argparse.Namespace) -> None:
    with progress_bar(args.json) as show:
        found = compare_files(args.first, args.second, on_progress=show)
    if args.plots:
        _draw(args.plots, [each.to_json() for each in found.differences])
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        say(found.to_text())


def _draw(folder: Path, tensors: list[dict]) -> None:
    """Pictures into a folder that is there, in place of older ones of the same names.

    Raises:
        QuantError: nothing to draw with or of, or a folder that takes no files.
    """
    for name, data in comparison_pictures(tensors).items():
        path = folder / f"{name}.png"
        try:
            write_whole(path, data)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
