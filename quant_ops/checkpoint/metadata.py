"""`_quantization_metadata` and `<layer>.comfy_quant`: reading what a file says, writing both
identically.
"""

from __future__ import annotations

import json

from ..errors import CheckpointError
from ..formats.base import params_of
from ..strict_json import parse, parse_bytes, shown

HEADER_KEY = "_quantization_metadata"
MAX_JSON_BYTES = 1 << 16  # of one layer's JSON; real ones have 20 to 400
OURS = "fewbits."  # prefix of the metadata keys that are rebuilt on every write


def header_markers(metadata: dict[str, str]) -> dict[str, dict]:
    """base name -> marker from the file header; empty when there is none.

    Raises:
        CheckpointError: the entry is not the JSON that ComfyUI would read.
    """
    text = metadata.get(HEADER_KEY)
    if text is None:
        return {}
    try:
        return markers_in(parse(text))
    except ValueError as error:
        raise CheckpointError(
            f"metadata {HEADER_KEY} cannot be read ({error}); try `fewbits repair`"
        ) from None


def markers_in(parsed: object) -> dict[str, dict]:
    """The markers of a header entry, by base name.

    Raises:
        ValueError: what is wrong with it.
    """
    layers = parsed.get("layers") if isinstance(parsed, dict) else None
    if not isinstance(layers, dict):
        raise ValueError("it has no object 'layers'")
    for base, marker in layers.items():
        try:
            _refuse_malformed(marker)
        except ValueError as error:
            raise ValueError(f"layer {shown(base)}: {error}") from None
    return layers


def read_marker(data: bytes) -> dict:
    """The JSON of a `comfy_quant` tensor.

    Raises:
        ValueError: why it is none. All-zero bytes are a known symptom of merged models.
    """
    if not any(data):
        raise ValueError("all zero bytes")
    try:
        marker = parse_bytes(data)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    _refuse_malformed(marker)
    return marker


def parse_marker(base: str, data: bytes) -> dict:
    """`read_marker`.

    Raises:
        CheckpointError: not a marker, naming the layer.
    """
    try:
        return read_marker(data)
    except ValueError as error:
        raise CheckpointError(
            f"layer {shown(base)}: comfy_quant is {error}; try `fewbits repair`"
        ) from None


def _refuse_malformed(marker: object) -> None:
    if not isinstance(marker, dict):
        raise ValueError(f"an object is needed, not {shown(marker)}")
    for where in (marker, params_of(marker)):
        name = where.get("format", "")
        if not isinstance(name, str):
            raise ValueError(f"JSON whose format is {shown(name)}; a format is text")


def output_metadata(
    source: dict[str, str],
    markers: dict[str, dict],
    *,
    version: str,
    recipe: str,
    min_comfyui: str,
    requires_pack: bool,
) -> dict[str, str]:
    """`__metadata__` of the output (docs/formats.md#container): foreign keys copied, ours rebuilt.

    No time, path or door.
    """
    kept = {
        key: value
        for key, value in source.items()
        if key != HEADER_KEY and not key.startswith(OURS)
    }
    if not markers:
        return kept
    return {
        **kept,
        HEADER_KEY: json.dumps({"format_version": "1.0", "layers": markers}),
        "fewbits.version": version,
        "fewbits.recipe": recipe,
        "fewbits.min_comfyui": min_comfyui,
        "fewbits.requires_pack": "true" if requires_pack else "false",
    }
