"""optimum-quanto: qint8, qfloat8, qint4, qint2 and their state dict.

| stored | becomes |
|---|---|
| `weight._data` I8, F8_E4M3 or F8_E5M2 (N, K) | `weight`, the same codes |
| `weight._scale` () or (N, 1), in the model's dtype | `weight_scale` F32, labelled by its shape |
| `input_scale`, `output_scale` | dropped: scales of activations, 1.0 where nothing was calibrated |
| `weight._data._data` U8 (rows / 2 or 4, G), `_scale` and `_shift` (rows, 1) | decoded |

Packed codes are those of the weight as rows of G columns, a scale each: the first half (or quarter)
of the rows lies in the lowest bits. w = (code - shift) * scale where the shift is a whole number,
else code * scale - shift. The file does not say the shape: the bias or the original does.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import CheckpointError
from ...spec import FLOAT_DTYPES
from .base import ImportOptions, StoredLayer, Tensors, Translation, floating
from .scaled import ScaleOf, translate_scaled

DATA, SCALE = "weight._data", "weight._scale"
PACKED, SHIFT = "weight._data._data", "weight._shift"
ACTIVATIONS = ("input_scale", "output_scale")


class QuantoBits:
    def claims(self, layer: StoredLayer) -> bool:
        return layer.codes == PACKED

    def translate(self, layer: StoredLayer, options: ImportOptions) -> Translation:
        """
        Raises:
            CheckpointError: sizes that do not fit each other, or none that says the shape.
        """
        rows, codes = _rows(layer), layer.weight
        per_byte = (
            next((n for n in (2, 4) if codes.shape[0] == -(-rows // n)), None) if rows else None
        )
        if per_byte is None or codes.dtype != "U8":
            raise CheckpointError(
                f"quanto's packed codes {codes.dtype} {list(codes.shape)} do not fit their scales; "
                "start from the original model"
            )
        size = codes.shape[1]
        shape = _shape(layer, options, rows * size)
        if shape[1] % size:
            raise CheckpointError(f"quanto's groups of {size} do not fit a weight of {list(shape)}")
        bits = 8 // per_byte

        def decode(tensors: Tensors) -> torch.Tensor:
            pieces = [
                tensors[PACKED] >> (bits * place) & (2**bits - 1) for place in range(per_byte)
            ]
            values, scale = torch.cat(pieces)[:rows].float(), tensors[SCALE].float()
            shift = tensors[SHIFT]
            if shift.is_floating_point():
                return values.mul_(scale).sub_(shift.float())
            return values.sub_(shift.float()).mul_(scale)

        dtype = layer.specs[SCALE].dtype
        return floating("quanto", layer, shape, decode, note=f"{bits} bit: decoded", dtype=dtype)


def _rows(layer: StoredLayer) -> int:
    """Rows of scales; 0 where the tensors are not those of quanto."""
    scale, shift = layer.specs.get(SCALE), layer.specs.get(SHIFT)
    if scale is None or shift is None or scale.dtype not in FLOAT_DTYPES:
        return 0
    alike = scale.shape == shift.shape == (scale.numel, 1) and len(layer.weight.shape) == 2
    if alike and shift.dtype in (*FLOAT_DTYPES, "I8"):
        return scale.numel
    return 0


def _shape(layer: StoredLayer, options: ImportOptions, count: int) -> tuple[int, int]:
    """
    Raises:
        CheckpointError: nothing says it, or what says it does not fit.
    """
    stated = options.shapes.get(f"{layer.name}.weight")
    rows = stated[0] if stated else layer.bias
    if not rows:
        raise CheckpointError(
            "quanto's packed codes do not say their shape; give the original file for the shapes",
            option="shapes",
        )
    if count % rows or (stated and stated != (rows, count // rows)):
        raise CheckpointError(f"quanto's {count} codes do not fit {rows} rows")
    return rows, count // rows


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
