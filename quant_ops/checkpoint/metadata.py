"""`_quantization_metadata` and `<layer>.comfy_quant`: reading what a file says, writing both
identically.
"""

from __future__ import annotations

import json

from ..errors import CheckpointError

HEADER_KEY = "_quantization_metadata"
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
        layers = json.loads(text)["layers"]
        return {base: dict(marker) for base, marker in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"metadata {HEADER_KEY} cannot be read ({error}); try `fewbits repair`"
        ) from None


def parse_marker(base: str, data: bytes) -> dict:
    """The JSON of a `comfy_quant` tensor.

    Raises:
        CheckpointError: not JSON (all-zero bytes are a known symptom of merged models), naming the
            layer.
    """
    try:
        marker = json.loads(data.decode("utf-8"))
        if not isinstance(marker, dict):
            raise ValueError("not an object")
    except ValueError as error:
        what = "all zero bytes" if not any(data) else f"not JSON: {error}"
        raise CheckpointError(
            f"layer '{base}': comfy_quant is {what}; try `fewbits repair`"
        ) from None
    return marker


def output_metadata(
    source: dict[str, str],
    markers: dict[str, dict],
    *,
    version: str,
    recipe: str,
    min_comfyui: str,
    requires_pack: bool,
) -> dict[str, str]:
    """`__metadata__` of the output (FORMATS 1.2): foreign keys copied, ours rebuilt. No time, path
    or door.
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
