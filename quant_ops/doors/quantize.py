"""quantize_file: a model file -> a quantized file, streamed layer by layer."""

from __future__ import annotations

import os

import torch

from ..calibration import Calibration
from ..checkpoint.importers.source import open_checkpoint
from ..checkpoint.second_reading import refuse_other_reading
from ..checkpoint.writer import FileSink
from ..pipeline import PlanFn, ProgressFn, ignore_progress, quantize
from ..planning.recipe import Recipe
from ..report.report import Report


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    verify: bool = False,
    device: torch.device | str = "cpu",
    calibration: Calibration | None = None,
    on_plan: PlanFn | None = None,
    on_progress: ProgressFn = ignore_progress,
) -> Report:
    """Convert a file, an index or a folder of shards to one safetensors file; streamed, atomic,
    input untouched.

    Layers in a foreign dialect are quantized already, and treated as such.

    Args:
        verify: before the file gets its name, decode every layer by the reference decoder too.

    Raises:
        QuantError: see `quantize`; and for a file that the reference decoder reads differently.
    """
    check = refuse_other_reading if verify else None
    sink = FileSink(target, overwrite=overwrite, check=check)
    for_gpu = torch.device(device).type == "cuda"
    # the sink writes every tensor away
    with open_checkpoint(source, short_lived=True, for_gpu=for_gpu) as opened:
        return quantize(
            opened,
            sink,
            recipe,
            device=device,
            calibration=calibration,
            on_plan=on_plan,
            on_progress=on_progress,
        )
