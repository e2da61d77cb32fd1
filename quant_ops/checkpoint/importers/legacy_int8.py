"""INT8 without a format name: legacy `scale_weight` (L2), INT8-Fast and comfy-quants (R1), no JSON
at all (R2).

| stored | becomes |
|---|---|
| `weight` I8, `scale_weight` or `weight_scale` | the same codes; label by the scale's shape against N, never K |
| R1: JSON `convrot`, `convrot_groupsize`, `per_row` without `format` | `format` added; `per_row` is only a hint |
| R2: rotation recorded nowhere | unrotated, unless --assume-convrot G says otherwise |
| `scale_input` | dropped: activations are scaled while running |
"""

from __future__ import annotations

from .base import ImportOptions, StoredLayer, Translation
from .scaled import translate_scaled


class LegacyInt8:
    """L2."""

    def claims(self, layer: StoredLayer) -> bool:
        return layer.weight.dtype == "I8" and "scale_weight" in layer.specs and layer.marker is None

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        return translate_scaled("L2", layer, "legacy INT8")


class Int8Fast:
    """R1."""

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
            "R1", layer, "INT8-Fast: format added", convrot=convrot, precise=layer.precise
        )


class Int8WithoutJson:
    """R2, and INT8 layers whose JSON is unreadable."""

    def claims(self, layer: StoredLayer) -> bool:
        return (
            layer.weight.dtype == "I8"
            and "weight_scale" in layer.specs
            and not layer.said.get("format")
        )

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        return translate_scaled("R2", layer, "INT8 without JSON", convrot=options.assume_convrot)
