"""hybrid_mxfp8: mxfp8 with one more number, which cannot stand for many exponents and is
ignored.

| stored | becomes |
|---|---|
| `weight`, `weight_scale` of mxfp8 | the same |
| `weight_scalar` | dropped |
| JSON `"format": "hybrid_mxfp8"` | mxfp8 |
"""

from __future__ import annotations

from dataclasses import replace

from .base import ImportOptions, StoredLayer, Translation
from .comfy_quant import ComfyQuant


class HybridMxfp8:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.said.get("format") == "hybrid_mxfp8"

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        specs = {suffix: spec for suffix, spec in layer.specs.items() if suffix != "weight_scalar"}
        plain = replace(layer, specs=specs, header_marker={**layer.marker, "format": "mxfp8"})
        made = ComfyQuant().translate(plain, replace(options, foreign_only=False))
        return replace(made, dialect="hybrid_mxfp8", note="becomes mxfp8, weight_scalar dropped")
