"""The functions that scripts call: flags in, a job out, run by the engine."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.importers import ImportOptions
from ..checkpoint.importers.source import open_checkpoint
from ..cli.quantize import pick_device
from ..doors import Conversion, convert_file, quantize_file
from ..pipeline import plan_source
from ..planning.template import write_template
from ..report.report import Report
from ..spec import ModelPlan
from .job import Job, make_job

# Names that the classic functions give to flags.
ARGUMENTS = {
    "include_input_scale": "input_scale",
    "no_learned_rounding": "simple",
    "skip_inefficient_layers": "heur",
    "layer_config_fullmatch": "fullmatch",
}


def quantize(**flags: object) -> Report | ModelPlan | Conversion | Path:
    """What the command does, with its flags as keywords (`input=`, `output=`, `int8=True`,
    `block_size=128`, ...).

    Returns:
        The report of a conversion, the plan for `dry_run="analyze"`, the path for
        `dry_run="create-template"`.

    Raises:
        QuantError: unknown, contradicting or malformed flags, or a file that cannot be converted.
    """
    return _perform(make_job(flags))


def convert_to_fp8_scaled(
    input_file: str | os.PathLike,
    output_file: str | os.PathLike,
    comfy_quant: bool = True,
    filter_flags: dict[str, bool] | None = None,
    calib_samples: int | None = None,
    seed: int = -1,
    **flags: object,
) -> Report:
    """The classic entry point: quantize a file. `filter_flags` names presets; `flags` are those of
    `quantize`.

    Raises:
        QuantError: as `quantize`; also for `comfy_quant=False`, as the legacy layout is never
            written.
    """
    if not comfy_quant:
        flags["legacy"] = True
    renamed = {ARGUMENTS.get(name, name): value for name, value in flags.items()}
    stated = {
        "input": input_file,
        "output": output_file,
        "manual_seed": seed,
        "calib_samples": calib_samples,
    }
    return quantize(**stated, **(filter_flags or {}), **renamed)


def convert_fp8_scaled_to_comfy_quant(
    input_file: str | os.PathLike,
    output_file: str | os.PathLike,
    hp_filter: str | None = None,
    full_precision_mm: bool = False,
    include_input_scale: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Legacy scaled_fp8 -> comfy_quant with the same codes (`--convert-fp8-scaled`); input scales
    are always kept.

    Raises:
        QuantError: not such a file, or a layer that `hp_filter` matches is FP8; nothing is written.
    """
    return quantize(
        input=input_file,
        output=output_file,
        convert_fp8_scaled=True,
        hp_filter=hp_filter,
        full_precision_mm=full_precision_mm,
        input_scale=include_input_scale,
        overwrite=overwrite,
    )


def _perform(job: Job) -> Report | ModelPlan | Conversion | Path:
    overwrite = "overwrite" in job.options
    if job.kind == "create-template":
        return write_template(job.input, overwrite=overwrite)
    if job.kind == "analyze":
        with open_checkpoint(job.input) as source:
            return plan_source(source, job.recipe)
    if job.kind == "convert":
        options = ImportOptions(full_precision_mm=job.options["precise"])
        pattern = job.options["hp_filter"]
        return convert_file(
            job.input,
            job.output,
            options=options,
            only="fp8_scaled",
            hp_filter=pattern,
            overwrite=overwrite,
        )
    device = pick_device(job.options.get("device", "auto"))
    return quantize_file(job.input, job.output, job.recipe, overwrite=overwrite, device=device)
