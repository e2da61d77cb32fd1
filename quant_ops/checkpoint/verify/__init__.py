"""Check a file: every layer decoded by the reference decoder, every known mistake of other writers
looked for.

A mistake is one `Mistake` with its name, what is wrong, what fixes it and its check, listed in the
module of what the check needs: the file (whole_file), a layer's names and shapes (stored), its
values (values), the original (compared). Mistakes in how a file is made or computed with cannot be
found in it, and are not here.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import CheckpointError
from ...sources import TensorSource
from ...spec import FLOAT_DTYPES
from ..host_layers import is_bank
from ..importers import ImportOptions, StoredLayer, translate
from ..importers.source import ImportedSource, as_loadable, read_contents, readable
from .compared import COMPARED, Pair, compare
from .findings import ORIGINAL, Finding, LayerCheck, Mistake, Verification
from .stored import EXPLAINED, STORED, is_host_layer, layer_findings
from .values import SCALE_BROKEN, UNREPAIRABLE, VALUES, value_findings
from .whole_file import METADATA_LOST, WHOLE_FILE, file_findings

UNREADABLE = Mistake("unreadable", "the layer cannot be decoded", ORIGINAL)

MISTAKES: dict[str, Mistake] = {
    mistake.name: mistake
    for mistake in (*WHOLE_FILE, *STORED, *VALUES, *COMPARED, METADATA_LOST, UNREADABLE)
}


def verify_source(source: TensorSource, original: TensorSource | None = None) -> Verification:
    """Check every layer of a source, one at a time; with the original also its error."""
    contents = read_contents(source)
    truth = None
    findings = file_findings(contents)
    if original is not None:
        truth = _decoded(original)
        missing = sorted(set(original.header.metadata) - set(source.header.metadata))
        findings += [METADATA_LOST.at("", f"key '{key}'") for key in missing]
    checks = []
    for base, layer in contents.layers.items():
        check, found = _check_layer(base, layer, truth)
        findings += found
        if check is not None:
            checks.append(check)
    if len({check.nibbles for check in checks} - {None}) > 1:
        what = "some layers store the low nibble first, others the high one"
        findings.append(UNREADABLE.at("", what))
    return Verification(source.name, tuple(checks), tuple(findings), tuple(source.header.warnings))


def stored_findings(source: TensorSource) -> list[Finding]:
    """The problems that names, shapes, JSON, scales and samples of codes show."""
    contents = read_contents(source)
    found = file_findings(contents)
    for layer in contents.layers.values():
        found += layer_findings(layer)
        made = readable(layer)
        if made is not None:
            found += value_findings(layer, made)
    return found


def _decoded(original: TensorSource) -> ImportedSource:
    return ImportedSource(original, retarget=lambda made: made.decoded("F32", ""))


def _check_layer(
    base: str, layer: StoredLayer, truth: ImportedSource | None
) -> tuple[LayerCheck | None, list[Finding]]:
    found = layer_findings(layer)
    if is_host_layer(layer) and is_bank(layer.said):
        try:
            translate(layer, ImportOptions())
        except CheckpointError as error:
            return None, [*found, UNREADABLE.at(base, str(error))]
        return LayerCheck(base, "bank of experts, not decoded", layer.said["format"]), found
    try:
        made = translate(layer, ImportOptions())
        if made is None:
            return None, found
        made = as_loadable(base, made)
        stored = {suffix: layer.read(suffix) for suffix in layer.specs}
        whole = replace(layer, read=stored.__getitem__, sample=None)
        found += value_findings(whole, made)
        canonical = made.convert(stored)
        if is_host_layer(layer):
            made.weight(canonical)
    except (RuntimeError, IndexError) as error:  # tensors that torch cannot bring together
        return None, [*found, UNREADABLE.at(base, str(error).splitlines()[0])]
    except CheckpointError as error:
        explained = any(finding.mistake in (*EXPLAINED, *UNREPAIRABLE) for finding in found)
        if not explained:
            found.append(UNREADABLE.at(base, str(error)))
        return None, found
    rel_l2 = None
    weight = truth and _original(truth, base)
    if weight is not None:
        rel_l2, more = compare(Pair(base, made, canonical, weight))
        found += more
    format = layer.said["format"] if is_host_layer(layer) else made.format
    return LayerCheck(base, made.dialect, format, rel_l2, nibbles=made.nibbles), found


def _original(truth: ImportedSource, base: str) -> torch.Tensor | None:
    spec = truth.header.tensors.get(f"{base}.weight")
    known = spec is not None and spec.dtype in FLOAT_DTYPES
    if known:
        return truth.read(spec.name).float()
    return None


__all__ = [
    "MISTAKES",
    "SCALE_BROKEN",
    "UNREPAIRABLE",
    "Finding",
    "LayerCheck",
    "Mistake",
    "Verification",
    "stored_findings",
    "verify_source",
]
