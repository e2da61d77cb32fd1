"""INT8 without a format name: legacy `scale_weight`, INT8-Fast and comfy-quants, no JSON at all.

| stored | becomes |
|---|---|
| `weight` I8, `scale_weight` or `weight_scale` | the same; label by the scale's shape against N |
| INT8-Fast: JSON `convrot`, `per_row` without `format` | `format` added; `per_row` is only a hint |
| no JSON: rotation recorded nowhere | unrotated, unless the user says otherwise |
| no JSON, and a flat scale as `convrot_w4a4` has it | refused |
| unreadable JSON, which could have said rotated | refused, unless the user says the rotation |
| `scale_input` | dropped: activations are scaled while running |
"""

from __future__ import annotations

from ...errors import CheckpointError
from ...formats.convrot_w4a4 import ConvRotW4A4
from ...formats.int8 import Int8Tensorwise
from .base import ImportOptions, StoredLayer, Translation
from .scaled import translate_scaled


class LegacyInt8:
    """scale_weight, no JSON."""

    def claims(self, layer: StoredLayer) -> bool:
        return layer.weight.dtype == "I8" and "scale_weight" in layer.specs and layer.marker is None

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        return _said_by_the_user("legacy-int8", layer, options, note="codes kept")


class Int8Fast:
    """JSON without `format`."""

    def claims(self, layer: StoredLayer) -> bool:
        named = layer.said.get("format")
        return (
            layer.weight.dtype == "I8"
            and not named
            and bool({"convrot", "per_row"} & set(layer.said))
        )

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        convrot = layer.said.get("convrot_groupsize", 256) if layer.said.get("convrot") else None
        return translate_scaled(
            "int8-fast", layer, "format added", convrot=convrot, precise=layer.precise
        )


class Int8WithoutJson:
    """No JSON, and INT8 layers whose JSON is unreadable."""

    def claims(self, layer: StoredLayer) -> bool:
        return (
            layer.weight.dtype == "I8"
            and "weight_scale" in layer.specs
            and not layer.said.get("format")
        )

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        scale = layer.specs["weight_scale"].shape
        if layer.marker is None and scale == layer.weight.shape[:1] and scale != (1,):
            raise CheckpointError(
                f"weight_scale is {list(scale)} and there is no JSON: {ConvRotW4A4.name} stores "
                f"two codes a byte so, {Int8Tensorwise.name} may; start from the original model"
            )
        return _said_by_the_user("int8-without-json", layer, options, note="JSON added")


def _said_by_the_user(
    dialect: str, layer: StoredLayer, options: ImportOptions, note: str
) -> Translation:
    """Codes whose rotation stands nowhere.

    Raises:
        CheckpointError: it may have stood in JSON that cannot be read.
    """
    if layer.unreadable and options.assume_convrot is None:
        raise CheckpointError(
            f"comfy_quant cannot be read ({layer.unreadable}), and could have said that the INT8 "
            "codes are rotated; say their rotation, or start from the original model",
            option="assume_convrot",
        )
    return translate_scaled(
        dialect, layer, note, convrot=options.assume_convrot, asked=("assume_convrot",)
    )
