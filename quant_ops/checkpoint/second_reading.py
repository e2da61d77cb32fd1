"""A written file read a second time, by a decoder that shares no code with what wrote it."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError
from ..formats import get_format
from ..reference import Stored, decode, read_layers
from ..sources import TORCH_DTYPES, Norms
from ..spec import TensorSpec
from .host_layers import host_layer
from .metadata import header_markers, parse_marker
from .reader import FileSource, stored_text, tensor_bytes

# Both decode the same codes: float32 against float64 in rotations differ by 3e-7 of the norm.
ALIKE = 1e-5
# Sums in float32 chunks against one in float64, and a rotation: below 1e-5 in every format.
SAME_NORM = 1e-3
DECODED = 1 << 24  # bytes of codes of a layer that is decoded to see this: 20 ms, 128 MB


def refuse_other_reading(path: Path, besides: Container[str] = ()) -> None:
    """Decode every quantized layer of a file of ours by both decoders.

    Args:
        besides: layers that nothing decodes: they lack their scale, as they did in the source.

    Raises:
        CheckpointError: they read different weights, or one cannot read a layer.
    """
    try:
        for base, marker, stored in read_layers(path):
            if base not in besides and not _copied(marker, stored):
                _compare(base, marker, stored)
    except (KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"the reference decoder cannot read what was written ({error}); nothing is kept, "
            "please report it"
        ) from error


def refuse_other_markers(source: FileSource) -> None:
    """
    Raises:
        CheckpointError: a layer's JSON is not what the file header says of it.
    """
    for base, marker in header_markers(source.header.metadata).items():
        name = f"{base}.comfy_quant"
        if name not in source.header.tensors:
            continue
        if parse_marker(base, stored_text(source, name)) != marker:
            raise CheckpointError(
                f"layer '{base}': its JSON and the file header's differ in what was written; "
                "nothing is kept, please report it"
            )


def refuse_other_norms(path: Path, norms: Norms, *, every: bool = False) -> None:
    """Decode the smallest layer of each format, and compare its length with what was measured
    before it was packed: a scale, a code or a label that went wrong between changes it.

    Args:
        every: decode all layers.

    Raises:
        CheckpointError: a layer of another length.
    """
    with FileSource(path) as source:
        markers = header_markers(source.header.metadata)
        sizes = {name: source.header.tensors[f"{name}.weight"].nbytes for name in norms}
        descending = sorted((name for name in norms if sizes[name] <= DECODED), key=sizes.get)[::-1]
        chosen = {markers[name]["format"]: name for name in descending}
        for name in norms if every else chosen.values():
            norm = _norm(source, name, markers[name])
            if not abs(norm - norms[name]) <= SAME_NORM * norms[name]:
                raise CheckpointError(
                    f"layer '{name}': the squares of the written weights add up to {norm:.6g}, "
                    f"those of the weights that were made to {norms[name]:.6g}; nothing is kept, "
                    "please report it"
                )


def _norm(source: FileSource, name: str, marker: dict) -> float:
    format = get_format(marker["format"])
    specs = {
        suffix: source.header.tensors[f"{name}.{suffix}"]
        for suffix in format.dtypes
        if f"{name}.{suffix}" in source.header.tensors
    }
    tensors = {suffix: source.read(spec.name) for suffix, spec in specs.items()}
    options, layer = format.options_from(marker, specs), format.stored_layer(marker, specs)
    return float(format.dequantize(tensors, layer, options).square_().sum(dtype=torch.float64))


def _copied(marker: dict, stored: dict[str, Stored]) -> bool:
    """Whether a layer is carried over as ComfyUI wrote it: nothing here writes or decodes such."""
    return host_layer(marker, _specs(stored)) is not None


def _specs(stored: dict[str, Stored]) -> dict[str, TensorSpec]:
    return {
        suffix: TensorSpec(suffix, tensor.dtype, tensor.shape) for suffix, tensor in stored.items()
    }


def _compare(base: str, marker: dict, stored: dict[str, Stored]) -> None:
    theirs = decode(marker, stored)
    ours = _ours(marker, stored)
    norm = float(np.linalg.norm(theirs))
    difference = np.inf
    if theirs.shape == ours.shape:
        difference = float(np.linalg.norm(theirs - ours))
    if not difference <= ALIKE * norm:
        raise CheckpointError(
            f"layer '{base}': the reference decoder reads other weights than ours (rel_l2 "
            f"{difference / (norm or 1.0):.2g}); nothing is kept, please report it"
        )


def _ours(marker: dict, stored: dict[str, Stored]) -> np.ndarray:
    format = get_format(marker["format"])
    specs = _specs(stored)
    tensors = {suffix: _tensor(tensor) for suffix, tensor in stored.items()}
    options, layer = format.options_from(marker, specs), format.stored_layer(marker, specs)
    return format.dequantize(tensors, layer, options).numpy()


def _tensor(stored: Stored) -> torch.Tensor:
    made = torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype])
    tensor_bytes(made)[:] = stored.data
    return made
