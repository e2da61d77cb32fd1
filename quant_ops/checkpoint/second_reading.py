"""A written file read a second time, by a decoder that shares no code with what wrote it."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError
from ..formats import get_format
from ..reference import Stored, decode, read_layers
from ..sources import TORCH_DTYPES
from ..spec import TensorSpec
from .host_layers import host_layer
from .reader import tensor_bytes

# Both decode the same codes: float32 against float64 in rotations differ by 3e-7 of the norm.
ALIKE = 1e-5


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
