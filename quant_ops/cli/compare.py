"""`fewbits compare A B`: how far the weights of one file are from another's, in any formats."""

from __future__ import annotations

import argparse
import json

from ..checkpoint.reader import FileSource
from ..doors import compare_files
from ..errors import CheckpointError
from ..options import as_json
from ..part import write_whole
from ..report.comparison import Comparison
from ..report.histograms import histograms
from ..report.plots import LAYERS, comparison_pictures, histogram_picture
from .door import say
from .progress import progress_bar


def run(args: argparse.Namespace) -> None:
    with progress_bar(args.json) as show:
        found = compare_files(args.first, args.second, on_progress=show)
    if args.plots:
        _draw(args, found)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        say(found.to_text())


def _draw(args: argparse.Namespace, found: Comparison) -> None:
    """Pictures into a folder that is there, in place of older ones of the same names.

    Raises:
        QuantError: nothing to draw with or of, or a folder that takes no files.
    """
    pictures = comparison_pictures(as_json(found.differences), args.theme)
    worst = [each.name.removesuffix(".weight") for each in found.worst() if each.is_weight]
    with FileSource(args.first) as first, FileSource(args.second) as second:
        layers = histograms(worst[:LAYERS], first, second)
    if layers:
        pictures["histograms"] = histogram_picture(layers, found.names, args.theme)
    for name, data in pictures.items():
        path = args.plots / f"{name}.png"
        try:
            write_whole(path, data)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
