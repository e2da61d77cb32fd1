"""What is in a file: family, layers per format, sizes, problems; reads the header and the markers
only.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

from ..checkpoint.diffusers import names_of
from ..checkpoint.gguf_source import GgufSource
from ..checkpoint.importers.source import ImportedSource, open_checkpoint, origins_of
from ..checkpoint.metadata import HEADER_KEY
from ..checkpoint.open import open_file
from ..errors import QuantError, visible
from ..pipeline import COPY, plan_source
from ..planning.model_family import described, find_parts
from ..report.report import megabytes
from ..sources import TensorSource
from ..spec import ModelPlan
from .problems import hides_contents, problems


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint; `formats` counts quantized layers, `dtypes` is dtype -> [tensors,
    bytes].

    `dialects` counts the layers that FewBits translates while opening the file, by dialect.
    """

    name: str
    bytes: int
    tensors: int
    family: str
    formats: dict[str, int]
    dtypes: dict[str, list[int]]
    loads_in: str
    metadata: dict[str, str]
    findings: tuple[str, ...]
    dialects: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict:
        return asdict(self)

    def to_text(self) -> str:
        lines = [
            f"{self.name}: {megabytes(self.bytes)}, {self.tensors} tensors, family {self.family}",
            self.loads_in,
        ]
        lines += [f"  {count:>5} layers  {name}" for name, count in self.formats.items()]
        lines += [
            f"  {count:>5} layers  in dialect {name}" for name, count in self.dialects.items()
        ]
        lines += [
            f"  {count:>5} tensors {dtype:<8} {megabytes(size)}"
            for dtype, (count, size) in self.dtypes.items()
        ]
        lines += [
            f"  {key} = {value[:100]}" for key, value in self.metadata.items() if key != HEADER_KEY
        ]
        lines += [f"problem: {finding}" for finding in self.findings] or [
            "no problems found in names, shapes, JSON and scales"
        ]
        return "\n".join(map(visible, lines))


def _loads_in(source: TensorSource, plan: ModelPlan | None) -> str:
    if plan is None:
        return "unknown: see the problems"
    if isinstance(source, GgufSource):
        return "GGUF: ComfyUI itself does not read it; quantize or convert it"
    names = names_of(source.header.tensors)
    if names is not None and not names.read_by_comfyui:
        return f"{names.tool} names: ComfyUI itself does not read them; quantize or convert it"
    return plan.loads_in()


def _opened_by_us(plan: ModelPlan) -> ModelPlan:
    """The plan of a file that ComfyUI itself does not read rightly."""
    if plan.min_comfyui:
        return replace(plan, requires_pack=True)
    label = "needs FewBits in ComfyUI, which decodes its layers while loading"
    return replace(plan, requires_pack=True, opened_by=label)


def inspect_file(path: str | os.PathLike) -> Inspection:
    """Inspect a file, an index or a folder of shards.

    Raises:
        CheckpointError: the container itself cannot be read; problems inside are `findings`.
    """
    with open_file(path) as source:
        header = source.header
        found = problems(source)
        findings = [*header.warnings, *(finding.to_text() for finding in found)]
        plan: ModelPlan | None = None
        dialects: dict[str, int] = {}
        stock = True
        try:
            with open_checkpoint(path) as opened:
                plan = plan_source(opened, COPY)
                dialects = origins_of(opened)
                stock = not isinstance(opened, ImportedSource) or opened.stock
        except QuantError as error:
            if not any(finding.fix is None for finding in found):
                findings.append(str(error))
        if any(map(hides_contents, found)):
            plan = None
        if plan and not stock:
            plan = _opened_by_us(plan)
        dtypes: dict[str, list[int]] = {}
        for spec in header.tensors.values():
            entry = dtypes.setdefault(spec.dtype, [0, 0])
            entry[0] += 1
            entry[1] += spec.nbytes
        formats = [layer.format for layer in plan.layers if layer.format] if plan else []
        parts = find_parts(header.tensors)
        titles = dict.fromkeys(described(part, header.tensors) for part in parts)
        files = {file for file, _, _ in header.ranges.values()}
        return Inspection(
            name=source.name,
            bytes=sum(file.stat().st_size for file in files),
            tensors=len(header.tensors),
            family=", ".join(titles) or "unknown",
            formats=dict(Counter(formats)),
            dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
            loads_in=_loads_in(source, plan),
            metadata=dict(header.metadata),
            findings=tuple(findings),
            dialects=dialects,
        )
