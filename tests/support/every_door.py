"""One file through every door: what they say must agree, and what they write must be right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from fewbits.quant_ops.checkpoint.importers import ImportOptions
from fewbits.quant_ops.checkpoint.importers.source import ImportedSource, open_checkpoint
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.doors import (
    convert_file,
    inspect_file,
    quantize_file,
    repair_file,
    verify_file,
)
from fewbits.quant_ops.doors.quantize import plan_file
from fewbits.quant_ops.errors import CheckpointError, QuantError
from fewbits.quant_ops.pipeline import COPY, plan_source
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support import strange

SHORT = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "nf4": "bnb_nf4", "nvfp4": "nvfp4"}
ASSUMED = {
    "nf4": ImportOptions(assume="nf4"),
    "fp4": ImportOptions(assume="fp4"),
    "nvfp4, high": ImportOptions(assume="nvfp4", nibble_order="high"),
    "rotated": ImportOptions(assume_convrot=64),
    "low nibbles": ImportOptions(nibble_order="low"),
}


def recipe(wish: str) -> Recipe:
    return Recipe(parse_wish(wish), preset="none")


def doors(path: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Door -> a call that writes `out`."""
    made: dict[str, Callable[[], object]] = {}
    for short, name in SHORT.items():
        made[f"quantize {short}"] = lambda name=name: quantize_file(path, out, recipe(name))
    made["requantize int8"] = lambda: quantize_file(path, out, recipe(SHORT["int8"]), requantize=True)  # fmt: skip
    for to in ("comfy_quant", "bf16", "bnb"):
        made[f"convert {to}"] = lambda to=to: convert_file(path, out, to=to)
    made["convert fp8_scaled"] = lambda: convert_file(path, out, only="fp8_scaled")
    made["repair"] = lambda: repair_file(path, out)
    for what, options in ASSUMED.items():
        made[f"repair, {what}"] = lambda options=options: repair_file(path, out, options=options)
    return made


def decoded(path: Path, name: str = "a") -> torch.Tensor | None:
    """A layer of a file in float32, as the decoders here read it; None where there is none."""
    with FileSource(path) as file:
        opened = ImportedSource(file, retarget=lambda made: made.decoded("F32", ""))
        if f"{name}.weight" not in opened.header.tensors:
            return None
        return opened.read(f"{name}.weight").float()


def distance(weight: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest relative error of a row; rows of zeros must be zeros."""
    if weight.shape != truth.shape:
        return float("inf")
    error, size = (weight - truth).norm(dim=1), truth.norm(dim=1)
    largest = torch.where(size > 0, error / size.clamp_min(1e-30), error).max()
    return float("inf") if bool(largest.isnan()) else float(largest)


@functools.cache
def rounding(kind: str, square: bool) -> float:
    """What the formats that doors write do to such a weight at most, row by row."""
    weight = strange.SQUARE if square else strange.WEIGHT
    name = SHORT[kind]
    stored, marker = strange.native(name, weight)
    return distance(_read(stored, marker), weight)


@functools.cache
def coarseness() -> float:
    """The largest error that a format of ours makes by itself."""
    errors = [
        distance(_read(*strange.native(name, strange.WEIGHT)), strange.WEIGHT)
        for name in strange.FORMATS
    ]
    return max(errors)


def _read(stored: dict[str, torch.Tensor], marker: dict) -> torch.Tensor:
    from fewbits.quant_ops.formats import get_format
    from fewbits.quant_ops.sources import spec_of

    format = get_format(marker["format"])
    specs = {suffix: spec_of(suffix, tensor) for suffix, tensor in stored.items()}
    options = format.options_from(marker, specs)
    return format.dequantize(stored, format.stored_layer(marker, specs), options)


def complaints(file: strange.File, path: Path) -> list[str]:
    """Everything in which the doors contradict each other, or are wrong about this file.

    Args:
        path: the file, alone in its folder.
    """
    found: list[str] = []
    before, out = path.read_bytes(), path.with_name("out.safetensors")
    inspection, refusal = _attempt(lambda: inspect_file(path), "inspect", found)
    verification, other = _attempt(lambda: verify_file(path), "verify", found)
    if refusal or other:
        if not (refusal and other):
            found.append(f"inspect: {refusal!r}; verify: {other!r}")
        _all_refuse(path, out, found)
        return found
    texts = {finding.to_text() for finding in verification.findings}
    fatal = {finding for finding in verification.findings if finding.fix is None}
    _, unplanned = _attempt(lambda: _plan(path), "plan", found)
    found += _agreement(inspection, texts, fatal, unplanned)
    worst = None
    if file.meaning is not None:
        worst, _ = _attempt(lambda: _distance(path, file.meaning), "decode", [])
    clear = not texts and not unplanned
    for name, door in doors(path, out).items():
        result, refused = _attempt(door, name, found)
        if refused:
            found += _refusal(name, refused, clear=clear, legible=file.legible, path=path, out=out)
            continue
        told = texts if "quantize" in name else set()
        found += _written(name, out, result, file, worst, told)
        out.unlink(missing_ok=True)
    for short in SHORT:
        dry, dry_refused = _attempt(lambda s=short: plan_file(path, recipe(SHORT[s])), "dry", found)
        if dry is not None and unplanned:
            found.append(f"plan is refused ({unplanned}), a dry run for {short} is not")
    if path.read_bytes() != before:
        found.append("the input was changed")
    if list(path.parent.iterdir()) != [path]:
        found.append(f"left behind: {[each.name for each in path.parent.iterdir()]}")
    return found


def _plan(path: Path) -> object:
    with open_checkpoint(path) as source:
        return plan_source(source, COPY)


def _attempt(door: Callable[[], object], name: str, found: list[str]) -> tuple[object, str]:
    """(result, "") or (None, the refusal); any other error is a complaint."""
    try:
        return door(), ""
    except QuantError as error:
        return None, str(error) or "an empty refusal"
    except Exception as error:
        found.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        return None, "an error that is no refusal"


def _all_refuse(path: Path, out: Path, found: list[str]) -> None:
    for name, door in doors(path, out).items():
        _, refused = _attempt(door, name, found)
        if not refused or out.exists():
            found.append(f"{name}: writes what inspect cannot open")
            out.unlink(missing_ok=True)


def _agreement(inspection, texts: set[str], fatal: set, unplanned: str) -> list[str]:
    said = set(inspection.findings)
    hidden = "see the problems" in inspection.loads_in
    found = []
    if not texts and said:
        found.append(f"inspect: {said}; verify: nothing")
    if texts and not said:
        found.append(f"verify: {texts}; inspect: nothing ({inspection.loads_in})")
    if fatal and not hidden:
        found.append(f"verify: {[f.to_text() for f in fatal]}; inspect: {inspection.loads_in}")
    if hidden and not texts:
        found.append(f"inspect: {inspection.loads_in}; verify: nothing")
    if unplanned and not said:
        found.append(f"plan is refused ({unplanned}), inspect says nothing")
    if "loads in stock" in inspection.loads_in and unplanned:
        found.append(f"plan is refused ({unplanned}), inspect: {inspection.loads_in}")
    return found


def _refusal(name, refused: str, *, clear: bool, legible: bool, path: Path, out: Path) -> list[str]:
    found = []
    if out.exists():
        found.append(f"{name}: refused ({refused}) and left an output")
        out.unlink()
    if not refused or path.name not in refused and "'" not in refused:
        found.append(f"{name}: the refusal names neither file nor layer: {refused}")
    plain = name in ("convert comfy_quant", "convert bf16", "repair")
    if plain and clear:
        found.append(f"{name}: refused ({refused}), no door finds a problem")
    if plain and legible:
        found.append(f"{name}: refused ({refused}), and it is to be read")
    return found


def _written(name, out: Path, result, file: strange.File, worst, told: set[str]) -> list[str]:
    found: list[str] = []
    after, broken = _attempt(lambda: verify_file(out), f"verify after {name}", found)
    opened, refused = _attempt(lambda: inspect_file(out), f"inspect after {name}", found)
    if broken or refused:
        return [*found, f"{name}: the output cannot be opened ({broken or refused})"]
    texts = {finding.to_text() for finding in after.findings}
    repaired = name.startswith("repair")
    if repaired and {finding.to_text() for finding in result.left} != texts:
        found.append(f"{name}: says {result.left} is left, verify finds {texts}")
    if not repaired and texts - told:
        found.append(f"{name}: success, and the output has {texts or opened.findings}")
    if bool(texts) != bool(opened.findings):
        found.append(f"{name}: of the output verify says {texts}, inspect {opened.findings}")
    if file.meaning is None or name.startswith("repair, "):  # what the user says counts there
        return found
    got, unread = _attempt(lambda: _distance(out, file.meaning), f"decode after {name}", found)
    if unread:
        return [*found, *([] if repaired and texts else [f"{name}: not decoded: {unread}"])]
    kind = name.split()[-1]
    square = file.meaning.shape == strange.SQUARE.shape
    allowed = rounding(kind, square) if kind in SHORT else 0.0
    allowed = max(allowed, coarseness()) + 0.02
    if not repaired and got > allowed:
        found.append(f"{name}: success, and a row is off by {got:.3g} ({allowed:.3g} allowed)")
    if repaired and worst is not None and got > max(worst, 0) + 0.01:
        found.append(f"{name}: makes the layer worse: {worst:.3g} -> {got:.3g}")
    if repaired and not texts and got > allowed:
        found.append(f"{name}: nothing is left, and a row is off by {got:.3g}")
    return found


def _distance(path: Path, truth: torch.Tensor) -> float:
    weight = decoded(path)
    if weight is None:
        raise CheckpointError(f"{path.name}: 'a' is gone")
    return distance(weight, truth)
