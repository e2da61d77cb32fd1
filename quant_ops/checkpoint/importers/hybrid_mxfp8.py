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

from ...formats.mxfp8 import Mxfp8
from .base import ImportOptions, StoredLayer, Translation
from .comfy_quant import ComfyQuant

(HYBRID,) = Mxfp8.read_as


class HybridMxfp8:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.said.get("format") == HYBRID

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        specs = {suffix: spec for suffix, spec in layer.specs.items() if suffix != "weight_scalar"}
        plain = replace(layer, specs=specs, header_marker={**layer.marker, "format": Mxfp8.name})
        made = ComfyQuant().translate(plain, replace(options, foreign_only=False))
        note = f"becomes {Mxfp8.name}, weight_scalar dropped"
        return replace(made, dialect=HYBRID, note=note)
