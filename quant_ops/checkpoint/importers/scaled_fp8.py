"""Legacy scaled FP8, as ComfyUI and convert_to_quant wrote it before comfy_quant.

| stored | becomes |
|---|---|
| `weight` F8_E4M3 or F8_E5M2 | the same bytes; the weight's dtype decides, never the marker's |
| `scale_weight`, or `weight_scale` without JSON | `weight_scale` F32; its shape gives the label |
| `scale_input`, or `input_scale` | `input_scale` F32 `()`, also when it is 1.0 |
| `scaled_fp8` of two elements, under any prefix | `full_precision_matrix_mult` below that prefix |
| e5m2 | `float8_e5m2`, always full precision |
| no scale, but a marker | scale 1.0 |
| FP8 that is not 2-D | decoded to bf16 |
"""

from __future__ import annotations

from dataclasses import replace

from ...formats.fp8 import Float8E4M3
from .base import FP8, ImportOptions, StoredLayer, Translation
from .scaled import translate_scaled

PRECISE = 2  # elements of a marker that asks for full-precision matrix products
# Where the loaders of comfy/sd.py look for a marker: at what they strip from a diffusion model, and
# anywhere among the text encoders of a checkpoint.
STRIPPED = ("model.diffusion_model.", "model.model.", "net.", "model.")
INSIDE = ("text_encoders.", "cond_stage_model.", "conditioner.")


class ScaledFp8:
    def claims(self, layer: StoredLayer) -> bool:
        if layer.weight.dtype not in FP8 or layer.marker is not None:
            return False
        return (
            layer.first("scale_weight", "weight_scale") is not None
            or layer.file.scope_of(layer.name) is not None
        )

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        scope = layer.file.scope_of(layer.name)
        precise = options.full_precision_mm or layer.file.scopes.get(scope) == PRECISE
        made = translate_scaled("scaled_fp8", layer, "codes kept", precise=precise)
        if scope is None:
            made = replace(
                made, warnings=(*made.warnings, "scaled FP8 layers without a scaled_fp8 marker")
            )
        return replace(made, stock=_read_by_comfyui(layer, made, scope))


def _read_by_comfyui(layer: StoredLayer, made: Translation, scope: str | None) -> bool:
    """Whether stock ComfyUI multiplies by the scale: `convert_old_quants` looks below a marker that
    stands where a loader asks for it, and for `scale_weight` only. It casts e5m2 to e4m3fn, and
    takes any scale for one number.
    """
    asked = scope is not None and (scope in ("", *STRIPPED) or scope.startswith(INSIDE))
    return asked and made.format == Float8E4M3.name and "weight_scale" not in layer.specs
