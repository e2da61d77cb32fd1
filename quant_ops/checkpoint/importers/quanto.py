"""optimum-quanto: qint8, qfloat8 and their state dict.

| stored | becomes |
|---|---|
| `weight._data` I8, F8_E4M3 or F8_E5M2 (N, K) | `weight`, the same codes |
| `weight._scale` () or (N, 1), in the model's dtype | `weight_scale` F32, labelled by its shape |
| `input_scale`, `output_scale` | dropped: scales of activations, 1.0 where nothing was calibrated |
| `weight._shift`, packed 2 and 4 bit codes | refused: their order is not stored |
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import CheckpointError
from .base import ImportOptions, StoredLayer, Tensors, Translation
from .scaled import ScaleOf, translate_scaled

DATA, SCALE = "weight._data", "weight._scale"
ACTIVATIONS = ("input_scale", "output_scale")


class Quanto:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.codes == DATA

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        if "weight._shift" in layer.specs or SCALE not in layer.specs:
            raise CheckpointError(
                "quanto's packed 2 and 4 bit codes do not say their order; start from the original "
                "model"
            )
        calibrated = [
            suffix
            for suffix in ACTIVATIONS
            if suffix in layer.specs and layer.number(suffix) != 1.0
        ]
        weight = {suffix: spec for suffix, spec in layer.specs.items() if suffix not in ACTIVATIONS}
        plain = replace(layer, specs=weight)
        made = translate_scaled("quanto", plain, "codes kept", scale=ScaleOf(SCALE, _scale))
        dropped = tuple(
            f"layer '{layer.name}': {suffix} dropped: activations are scaled while running"
            for suffix in calibrated
        )
        return replace(made, warnings=(*made.warnings, *dropped))


def _scale(tensors: Tensors):
    return tensors[SCALE]
