"""Seam `foreign`: other tools' dialects become ComfyUI's before it recognises the model.

Wraps: `comfy.utils.convert_old_quants`, which every stock loader calls on what it has just read.
Why: stock loaders open files of bitsandbytes and others, and old scaled FP8 files keep their
    number format: ComfyUI's own conversion labels e5m2 codes e4m3fn.
Since: ComfyUI 0.4.
Without it: foreign files are not recognised, or fail in a shape mismatch; scaled e5m2 is cast
    again, which rounds it a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.quant_ops
import comfy.utils
import torch

from ....quant_ops.checkpoint.importers import ImportOptions
from ....quant_ops.checkpoint.importers.source import ImportedSource, is_side
from ....quant_ops.checkpoint.metadata import HEADER_KEY
from ....quant_ops.formats.base import marker_bytes
from ....quant_ops.sources import DTYPE_NAMES, MemorySource
from .formats import OWNED
from .wrap import wrap

logger = logging.getLogger(__name__)


def install() -> None:
    wrap(comfy.utils, "convert_old_quants", _translate_first)


def _translate_first(
    original: Callable,
    state_dict: dict,
    model_prefix: str = "",
    metadata: dict | None = None,
    **kwargs: object,
):
    state_dict, metadata = translate_state_dict(state_dict, metadata, OWNED)
    return original(state_dict, model_prefix, metadata=metadata, **kwargs)


def translate_state_dict(
    state_dict: dict, metadata: dict | None, owned: set[str]
) -> tuple[dict, dict]:
    """A state dict with every foreign layer in canonical form; the one given when nothing in it is
    foreign.

    All keys are translated, whatever prefix the loader asks about: a checkpoint is converted once
    for all its parts. Doing it twice changes nothing.

    Args:
        owned: formats that this ComfyUI does not read itself.

    Raises:
        CheckpointError: a layer that cannot be read without guessing, by name.
    """
    metadata = {} if metadata is None else metadata
    if not any(is_side(name) for name in state_dict):
        return state_dict, metadata
    known = {
        name: value
        for name, value in state_dict.items()
        if getattr(value, "dtype", None) in DTYPE_NAMES
    }
    host_formats = frozenset(comfy.quant_ops.QUANT_ALGOS) - owned
    texts = {key: text for key, text in metadata.items() if isinstance(text, str)}
    source = ImportedSource(
        MemorySource(known, texts, "the model"),
        ImportOptions(foreign_only=True, host_formats=host_formats),
    )
    if source.changes_nothing:
        return state_dict, metadata
    for origin, count in source.origins().items():
        logger.info("FewBits: %d layers from %s", count, origin)
    translated = {name: value for name, value in state_dict.items() if name not in known}
    for name in source.header.tensors:
        translated[name] = source.read(name)
    for base, layer in source.contents.layers.items():
        made = source.translations.get(base)
        marker = made.marker if made else layer.header_marker
        if marker is not None:
            translated[f"{base}.comfy_quant"] = torch.frombuffer(
                bytearray(marker_bytes(marker)), dtype=torch.uint8
            )
    # The header's entries are beside the layers now; their names would be wrong once a prefix is
    # stripped.
    return translated, {key: value for key, value in metadata.items() if key != HEADER_KEY}
