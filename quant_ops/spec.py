"""The nouns of planning: what a tensor is, what is decided for a layer, what is decided for a
model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

from .options import Options

# safetensors dtype name -> bytes per element
ITEM_SIZES = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype name and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Header:
    """Tensors of a checkpoint in stored order, its `__metadata__`, and where each tensor's bytes
    lie.

    `ranges[name]` is (file, first byte, one past the last byte), absolute in that file; empty for
    in-memory sources. `fixed` says of layers that cannot be stored quantized why not, where the
    source knows that: in a graph, the module says what it is.
    """

    tensors: dict[str, TensorSpec]
    metadata: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[Path, int, int]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    fixed: dict[str, str] = field(default_factory=dict)
    # base names of layers that are copied as they are stored, whatever their JSON says
    left: frozenset[str] = frozenset()
    # names of tensors that a LoRA or another patch changed: such a source has `unpatched(name)`
    patched: frozenset[str] = frozenset()

    def weights(self) -> list[str]:
        """Base names of everything that has a weight."""
        names = (name.rpartition(".") for name in self.tensors)
        return [base for base, dot, suffix in names if dot and suffix == "weight"]


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What a format is asked to store: a weight's logical (N, K), its safetensors dtype, whether it
    has a bias.

    `dtype` is None for a stored layer that does not say what it was made from.
    """

    shape: tuple[int, int]
    dtype: str | None
    bias: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one layer (or for one tensor that belongs to no layer).

    `name` is the base name (the key without `.weight`), or the whole key for other tensors.
    `inputs` are the source tensors that the layer owns, `outputs` the tensors that will be written
    for it.
    """

    name: str
    action: str  # "quantize" | "recode" | "keep" | "drop"
    reason: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    format: str | None = None
    options: Options = field(default_factory=Options)
    method: str | None = None
    marker: dict | None = None
    requested: str | None = None
    # the rule that decided, as `ModelPlan.rules` names it; empty for what is no candidate
    rule: str = ""
    method_options: tuple[tuple[str, object], ...] = ()

    @property
    def bytes_before(self) -> int:
        return sum(spec.nbytes for spec in self.inputs)

    @property
    def bytes_after(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)

    @property
    def is_layer(self) -> bool:
        """True for rows a person reads: 2-D weights and everything quantized; False for biases,
        norms and the like.
        """
        return self.action in ("quantize", "recode") or any(
            spec.name.endswith(".weight") and len(spec.shape) == 2 for spec in self.inputs
        )

    def to_json(self) -> dict:
        weight = next(
            (spec for spec in self.inputs if spec.name == f"{self.name}.weight"), self.inputs[0]
        )
        return {
            "name": self.name,
            "action": self.action,
            "format": self.format,
            "options": self.options.stated(),
            "method": self.method,
            "dtype": weight.dtype,
            "shape": list(weight.shape),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "reason": self.reason,
            "requested": self.requested,
            "rule": self.rule,
        }


@dataclass(frozen=True)
class RuleUse:
    """One line of the compiled rule list: how many layers its pattern matched, and how many of them
    it decided.
    """

    rule: str
    pattern: str
    action: str
    matched: int
    won: int


SUPPORTED_COMFYUI = "0.18.0"  # and newer; pyproject.toml repeats it for the Comfy registry
NOT_RECOGNISED = ", if ComfyUI knows this model: FewBits does not recognise it"


@dataclass(frozen=True)
class ModelPlan:
    """The decision for every tensor of a model. Pure data: printable, JSON, exact output size."""

    layers: tuple[LayerPlan, ...]
    metadata: dict[str, str]
    family: str
    min_comfyui: str
    requires_pack: bool
    recognised: bool = True  # whether the model is known that ComfyUI must know to open the file
    unmatched: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    rules: tuple[RuleUse, ...] = ()  # in order: the first that matches a layer decides about it
    # TOML from which the same plan comes again; empty where nothing was wished for
    recipe: str = ""
    family_title: str = ""  # the family as people write it
    # who opens the file where it is not ComfyUI's own form; said in place of all else
    opened_by: str = ""

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """All tensors to write, in file order: widest element first, then name (as the safetensors
        library does).
        """
        specs = chain(*(layer.outputs for layer in self.layers))
        return tuple(sorted(specs, key=lambda spec: (-ITEM_SIZES[spec.dtype], spec.name)))

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def summary(self) -> list[dict]:
        """One row per format, largest first; `keep` gathers what stays as it is, `drop` what is
        left out.
        """
        rows: dict[str, dict] = {}
        for layer in self.layers:
            label = layer.format or layer.action
            row = rows.setdefault(
                label, {"format": label, "layers": 0, "bytes_before": 0, "bytes_after": 0}
            )
            row["layers"] += layer.is_layer
            row["bytes_before"] += layer.bytes_before
            row["bytes_after"] += layer.bytes_after
        return sorted(rows.values(), key=lambda row: -row["bytes_before"])

    def loads_in(self) -> str:
        """Where the file opens, as every result is labelled."""
        if self.opened_by:
            return self.opened_by
        if not self.min_comfyui:
            label = "loads in stock ComfyUI (nothing is quantized)"
        elif self.requires_pack:
            least = max(self.min_comfyui, SUPPORTED_COMFYUI, key=version_key)
            label = f"needs FewBits in ComfyUI >= {least}"
        else:
            label = f"loads in stock ComfyUI >= {self.min_comfyui}"
        if self.recognised:
            return label
        return label + NOT_RECOGNISED

    def to_json(self) -> dict:
        return {
            "family": self.family,
            "family_title": self.family_title or self.family,
            "min_comfyui": self.min_comfyui,
            "requires_pack": self.requires_pack,
            "loads_in": self.loads_in(),
            "recognised": self.recognised,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "summary": self.summary(),
            "layers": [layer.to_json() for layer in self.layers if layer.is_layer],
            "rules": list(map(vars, self.rules)),
            "recipe": self.recipe,
            "unmatched": list(self.unmatched),
            "warnings": list(self.warnings),
        }


def compact_json(value: object) -> str:
    """JSON without spaces and with sorted keys: the same value always gives the same text."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def version_key(version: str) -> tuple[int, ...]:
    """`"0.27.0"` -> `(0, 27, 0)`, for comparing minimum ComfyUI versions."""
    return tuple(int(part) for part in version.split("."))
