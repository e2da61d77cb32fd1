"""The seams: every place where FewBits takes hold of ComfyUI, one file each.

A file's docstring says what it wraps, why, since which ComfyUI, and what breaks without it. The
name of a seam in `status()` and in the log is the name of its file.
"""

from __future__ import annotations

from collections.abc import Callable

from . import (
    control_lora,
    controlnet,
    detection,
    encoder_names,
    foreign,
    formats,
    layers,
    low_rank,
    merging,
    text_encoders,
)

# `formats` is first: it finds out which formats are ours, and the others ask.
SEAMS: dict[str, Callable[[], None]] = {
    module.__name__.rpartition(".")[2]: module.install
    for module in (
        formats,
        layers,
        text_encoders,
        foreign,
        detection,
        merging,
        controlnet,
        control_lora,
        encoder_names,
        low_rank,
    )
}
