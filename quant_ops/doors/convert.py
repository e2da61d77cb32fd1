"""convert_file: another dialect without new codes, bitsandbytes' keys, or a plain model."""

from __future__ import annotations

import logging
import os
from contextlib import closing
from dataclasses import dataclass, replace

from ..checkpoint.diffusers import renamed
from ..checkpoint.exporters import KINDS, TARGETS
from ..checkpoint.importers import ImportOptions
from ..checkpoint.importers.scaled_fp8 import ScaledFp8
from ..checkpoint.importers.source import (
    ImportedSource,
    origins_of,
    refuse_damaged,
    refuse_unexplained,
)
from ..checkpoint.open import open_file
from ..errors import CheckpointError, RecipeError, visible
from ..formats import FORMATS
from ..pipeline import ProgressFn, ignore_progress, rewrite
from ..planning.match import Regex, shortened
from ..report.report import Report, plan_lines
from ..spec import FLOAT_DTYPES, ModelPlan, version_key
from .problems import checked_sink

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """`origins` counts layers by dialect and what was done; `high_precision` the layers that
    hp_filter matched.
    """

    report: Report
    origins: dict[str, int]
    high_precision: int | None = None

    def to_text(self) -> str:
        """What became of the layers, sizes and warnings, for a terminal or a text node."""
        lines = [f"{count:>5} layers  {origin}" for origin, count in self.origins.items()] or [
            "nothing to convert"
        ]
        if self.high_precision is not None:
            lines.append(f"{self.high_precision} layers match the filter, all high precision")
        return "\n".join([*map(visible, lines), *plan_lines(self.report.plan)])

    def to_json(self) -> dict:
        return {
            **self.report.to_json(),
            "origins": self.origins,
            "high_precision": self.high_precision,
        }


def convert_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str = "comfy_quant",
    options: ImportOptions | None = None,
    only: str | None = None,
    hp_filter: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
    on_progress: ProgressFn = ignore_progress,
) -> Conversion:
    """Convert a file to another dialect: codes unchanged where that is possible, decoded where it
    is not. A model under diffusers' names gets ComfyUI's, but for bitsandbytes' keys.

    Args:
        to: comfy_quant, bnb or bf16.
        verify: before the file gets its name, decode every layer by the reference decoder too;
            only for comfy_quant, the one it reads.
        only: "fp8_scaled" refuses any file that is not one.
        hp_filter: regular expression; every layer whose base name it finds must be high precision.

    Raises:
        RecipeError: unknown target, invalid expression, or a layer that hp_filter matches is not
            high precision; nothing is written.
        CheckpointError: a layer that cannot be read without guessing; nothing is written.
    """
    if to not in TARGETS:
        raise RecipeError(f"unknown target {to!r}; known: {', '.join(TARGETS)}")
    pattern = None
    if hp_filter is not None:
        pattern = Regex(hp_filter, f"high-precision filter {shortened(hp_filter)!r}")
    if verify and to != "comfy_quant":
        raise RecipeError(f"verify reads comfy_quant files, not {to}; leave it out")
    sink = checked_sink(target, overwrite=overwrite, verify=verify)
    with open_file(source) as file, closing(ImportedSource(file, options, TARGETS[to])) as opened:
        refuse_unexplained(opened.name, opened.contents)
        refuse_damaged(opened.name, opened.contents)
        if only == "fp8_scaled":
            _refuse_unscaled(opened)
        matched = _high_precision(opened, pattern) if pattern else None
        if to == "bnb":
            _refuse_unknown_to_bitsandbytes(opened)
        written = opened if to == "bnb" else renamed(opened)
        report = rewrite(written, sink, on_progress=on_progress)
        if to == "bnb":
            report = replace(report, plan=_opened_by_bitsandbytes(report.plan, opened))
        if matched == 0:
            logger.warning("the high-precision filter %r matches no layer", hp_filter)
        return Conversion(report, origins_of(written), matched)


def _refuse_unknown_to_bitsandbytes(opened: ImportedSource) -> None:
    """A file of other formats only would become a plain model: that is what bf16 is for."""
    formats = {made.format for made in opened.canonical.values() if made.format}
    if formats and not formats & set(KINDS):
        raise CheckpointError(
            f"{opened.name}: no layer is in a format of bitsandbytes ({', '.join(KINDS)}); found "
            f"{', '.join(sorted(formats))}: convert it to bf16, which decodes it"
        )


def _opened_by_bitsandbytes(plan: ModelPlan, opened: ImportedSource) -> ModelPlan:
    """The plan's label: ComfyUI itself takes such a file for a plain one."""
    formats = {made.format for made in opened.canonical.values()} & set(KINDS)
    if not formats:
        return plan
    since = max((FORMATS[name].min_comfyui for name in formats), key=version_key)
    label = (
        "bitsandbytes' own keys, as diffusers and transformers read them; needs FewBits in ComfyUI "
        f">= {since}"
    )
    return replace(plan, requires_pack=True, opened_by=label)


def _refuse_unscaled(opened: ImportedSource) -> None:
    claims = ScaledFp8().claims
    if not opened.contents.scopes and not any(
        claims(layer) for layer in opened.contents.layers.values()
    ):
        raise CheckpointError(
            f"{opened.name}: not a scaled_fp8 file: no scaled_fp8 marker, no FP8 layer with "
            "scale_weight"
        )


def _high_precision(opened: ImportedSource, pattern: Regex) -> int:
    """How many layers match, all of them high precision."""
    layers = {base: layer for base, layer in opened.contents.layers.items() if pattern.search(base)}
    wrong = [
        f"{base} ({layer.weight.dtype})"
        for base, layer in layers.items()
        if layer.weight.dtype not in FLOAT_DTYPES
    ]
    if wrong:
        raise RecipeError(
            f"{opened.name}: {len(wrong)} of {len(layers)} layers that the filter matches are not "
            f"high precision: {', '.join(wrong)}; nothing was written",
            option="hp_filter",
        )
    return len(layers)
