"""4-bit codes of a flattened weight: nibble order, logical shape and code table, for every dialect
that has them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....kernels.codebook4 import FP4_MAGNITUDES, NF4_VALUES
from ...errors import CheckpointError
from ...formats import FORMATS, FormatOptions
from ...formats.base import PRECISE, dtype_from_json
from ...formats.bnb_4bit import Bnb4Bit
from ...spec import FLOAT_DTYPES, LayerInput
from ...strict_json import parse, shown
from ..header import MAX_RANK, MAX_SIZE
from ..metadata import MAX_JSON_BYTES
from ..reader import tensor_text
from .base import ImportOptions, StoredLayer, Tensors, Translation, floating, quantized, resolved

FP4_VALUES = (*FP4_MAGNITUDES, *(-value for value in FP4_MAGNITUDES))
AF4_VALUES = (
    1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164,
    0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0,
)  # fmt: skip
TABLES = {"nf4": NF4_VALUES, "fp4": FP4_VALUES, "af4": AF4_VALUES}
# table -> the format of ours that has it
WRITTEN = {format.table: name for name, format in FORMATS.items() if isinstance(format, Bnb4Bit)}
IDENTITY = tuple(range(16))
# tables are stored with 4 to 9 digits; the closest two levels, 0 and 0.0625/12, are 5 times as far
# apart
SAME = 1e-3
ORDERS = {"high": "high", "hi_first": "high", "low": "low", "lo_first": "low"}
LOW_NIBBLE_FLOOR = 1e-12  # smallest absmax that the converters of 30 December 2025 wrote


@dataclass(frozen=True)
class Order:
    """Which nibble comes first ("high" | "low"), what the user is to know, and whether it was their
    word that decided.
    """

    first: str
    warnings: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Codes:
    """How to read one layer: `kind` nf4, fp4 or af4, `table` as stored or None, `absmax(tensors)`
    in any shape.
    """

    kind: str
    group_size: int
    shape: tuple[int, ...]
    order: Order
    table: tuple[float, ...] | None
    absmax: Callable[[Tensors], torch.Tensor]
    absmax_count: int
    dtype: str | None = None


def translate_codes(
    dialect: str, layer: StoredLayer, codes: Codes, note: str, asked: tuple[str, ...] = ()
) -> Translation:
    """bnb_nf4 or bnb_fp4 with the same codes where the format holds them, else a float weight.

    Raises:
        CheckpointError: byte or absmax counts do not fit the shape.
    """
    numel = math.prod(codes.shape)
    if not numel:
        raise CheckpointError(f"shape is {list(codes.shape)}: there is nothing in this layer")
    if layer.weight.nbytes != -(-numel // 2):
        raise CheckpointError(
            f"weight has {layer.weight.nbytes} bytes, {list(codes.shape)} needs {-(-numel // 2)} "
            "at 4 bits"
        )
    if codes.absmax_count != -(-numel // codes.group_size):
        raise CheckpointError(
            f"absmax has {codes.absmax_count} entries, {list(codes.shape)} in groups of "
            f"{codes.group_size} needs {-(-numel // codes.group_size)}"
        )
    asked = (*asked, *codes.order.asked)
    name = WRITTEN.get(codes.kind)
    options = (
        resolved(name, {"block_size": codes.group_size, PRECISE: layer.precise}) if name else None
    )
    recoded = _recoding(codes)
    obstacle = _obstacle(codes, options, recoded)
    if obstacle:
        note = f"{note}; {obstacle}: decoded"
        return floating(
            dialect,
            layer,
            codes.shape,
            lambda t: decode_codes(t, codes),
            note=note,
            dtype=codes.dtype,
            nibbles=codes.order.first,
            asked=asked,
        )
    source = LayerInput((codes.shape[0], codes.shape[1]), codes.dtype)

    def convert(tensors: Tensors) -> Tensors:
        packed = _bytes_of(tensors["weight"])
        if codes.order.first == "low":
            packed = swap_nibbles(packed)
        if recoded != IDENTITY:
            packed = _replace_codes(packed, recoded)
        return {"weight": packed, "absmax": codes.absmax(tensors)}

    return quantized(
        dialect,
        layer,
        name,
        source,
        options=options,
        convert=convert,
        note=note,
        nibbles=codes.order.first,
        warnings=codes.order.warnings,
        asked=asked,
    )


def plain_absmax(layer: StoredLayer, suffix: str) -> Callable[[Tensors], torch.Tensor]:
    """The absmax that is stored as numbers.

    Raises:
        CheckpointError: it is stored as something else.
    """
    dtype = layer.specs[suffix].dtype
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{suffix} is {dtype}; F32 is needed (BF16, F16 and F64 are read)")
    return lambda tensors: tensors[suffix]


def _obstacle(
    codes: Codes, options: FormatOptions | None, recoded: tuple[int, ...] | None
) -> str | None:
    """Why no format of ours holds these codes as they are."""
    if codes.kind not in WRITTEN:
        return f"{codes.kind} is not written by any format"
    if recoded is None:
        return "the stored table is neither NF4 nor FP4"
    if options is None:
        return f"groups of {codes.group_size} are not written by any format"
    if len(codes.shape) != 2:
        return f"not 2-D {list(codes.shape)}"
    if codes.shape[1] % 2:
        return f"K={codes.shape[1]} is odd"
    return None


def _recoding(codes: Codes) -> tuple[int, ...] | None:
    """stored code -> our code, when the stored table holds the same values in any order; None when
    it does not.
    """
    if codes.table is None or codes.kind not in WRITTEN:
        return IDENTITY
    ours = TABLES[codes.kind]
    found = []
    for index, value in enumerate(codes.table):
        close = [code for code, known in enumerate(ours) if abs(known - value) < SAME]
        if not close:
            return None
        # FP4 has two zeros: the negative half keeps the negative one
        found.append(close[-1] if index >= 8 else close[0])
    if sorted(found) == list(IDENTITY):
        return tuple(found)
    return None


def decode_codes(tensors: Tensors, codes: Codes) -> torch.Tensor:
    """float32 of the logical shape: table[code] * absmax[flat // g], by the stored table."""
    packed = _bytes_of(tensors["weight"])
    nibbles = [packed >> 4, packed & 15]
    if codes.order.first != "high":
        nibbles.reverse()
    numel = math.prod(codes.shape)
    indices = torch.stack(nibbles, -1).reshape(-1)[:numel].int()
    table = torch.tensor(
        codes.table or TABLES[codes.kind], dtype=torch.float32, device=packed.device
    )
    values = torch.index_select(table, 0, indices)
    # one block may be stated far larger than the layer: what is allocated follows the layer
    size = min(codes.group_size, numel)
    scale = codes.absmax(tensors).float().reshape(-1).repeat_interleave(size)[:numel]
    return values.mul_(scale).reshape(codes.shape)


def _bytes_of(weight: torch.Tensor) -> torch.Tensor:
    """The stored bytes, whatever dtype they were stored under; a view."""
    return weight.contiguous().view(-1).view(torch.uint8)


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low nibble first -> high nibble first, and back."""
    return (packed << 4) | (packed >> 4)


def _replace_codes(packed: torch.Tensor, recoded: tuple[int, ...]) -> torch.Tensor:
    table = torch.tensor(
        [recoded[byte >> 4] << 4 | recoded[byte & 15] for byte in range(256)], dtype=torch.uint8
    )
    return torch.index_select(table.to(packed.device), 0, packed.int())


def logical_shape(layer: StoredLayer, stated: object, options: ImportOptions) -> tuple[int, ...]:
    """The shape before packing, from the first that says it: JSON, quant_state, original, bias.

    Args:
        stated: `shape` of the quant_state, if there is one.

    Raises:
        CheckpointError: nothing says it.
    """
    for shape in (layer.said.get("shape"), stated, options.shapes.get(f"{layer.name}.weight")):
        if shape is not None:
            return _beside_bias(sizes(shape), layer)
    count = 2 * layer.weight.nbytes
    if layer.bias and count % layer.bias == 0:
        return layer.bias, count // layer.bias
    raise CheckpointError(
        f"4-bit weight of {layer.weight.nbytes} bytes does not say its shape; give the original "
        "file for the shapes",
        option="shapes",
    )


def _beside_bias(shape: tuple[int, ...], layer: StoredLayer) -> tuple[int, ...]:
    """
    Raises:
        CheckpointError: the layer's bias has other rows.
    """
    if layer.bias is not None and len(shape) == 2 and shape[0] != layer.bias:
        raise CheckpointError(
            f"its shape is said to be {list(shape)}, and its bias has {layer.bias} rows"
        )
    return shape


def sizes(shape: object) -> tuple[int, ...]:
    """A stated shape.

    Raises:
        CheckpointError: not a short list of positive sizes.
    """
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > MAX_RANK
        or not all(type(size) is int and 0 < size <= MAX_SIZE for size in shape)
    ):
        raise CheckpointError(f"shape is {shown(shape)}, a list of sizes is needed")
    return tuple(shape)


def group_size(value: object) -> int:
    """A stated group size. It may be larger than the layer, whose only block then is not full.

    Raises:
        CheckpointError: not a positive number.
    """
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise CheckpointError(f"group size is {shown(value)}, a positive number is needed")
    return value


def stored_table(layer: StoredLayer, suffix: str) -> tuple[float, ...] | None:
    """The 16 levels stored as a tensor or in the JSON; None without any.

    Raises:
        CheckpointError: not 16 numbers.
    """
    stated = layer.said.get("quant_map")
    if suffix in layer.specs:
        if layer.specs[suffix].numel != len(IDENTITY):
            raise CheckpointError(f"{suffix} has {layer.specs[suffix].numel} entries, not 16")
        stated = layer.read(suffix).float().reshape(-1).tolist()
    if stated is None:
        return None
    if not isinstance(stated, list) or len(stated) != 16:
        raise CheckpointError(f"{suffix} must hold 16 numbers")
    return tuple(finite(value, suffix) for value in stated)


def finite(value: object, what: str) -> float:
    """A stated number.

    Raises:
        CheckpointError: no number, or none that a float holds.
    """
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(f"{what} is {shown(value)}, a finite number is needed")
    return float(value)


def stated_order(layer: StoredLayer) -> str | None:
    """The nibble order that the layer's JSON names; None for anything else in its place."""
    said = layer.said.get("nibble_order")
    if isinstance(said, str):
        return ORDERS.get(said)
    return None


def nibble_order(
    layer: StoredLayer,
    options: ImportOptions,
    *,
    kind: str,
    table: tuple[float, ...] | None,
    nested: bool = False,
    state_text: str = "",
    absmax: str = "absmax",
) -> Order:
    """The first rule that applies decides."""
    said = stated_order(layer)
    if said:
        return Order(said)
    if nested:
        return Order("high")
    if len(layer.weight.shape) == 1 and absmax == "absmax" and absmax in layer.specs:
        return Order("low")
    if kind == "fp4" and table is not None:
        if abs(table[2] - 2 / 3) < SAME:
            return Order("high")
        if abs(table[2] - 1 / 6) < SAME:
            return Order("low")
    if layer.file.low_nibble_first:
        return Order("low")
    first_key = next(iter(_parsed(state_text)), None)
    if first_key in ("quant_type", "dtype"):
        return Order("high" if first_key == "quant_type" else "low")
    floor = torch.tensor(LOW_NIBBLE_FLOOR)
    if absmax in layer.specs and bool((layer.read(absmax).float() == floor).any()):
        return Order("low")
    if options.nibble_order:
        return Order(options.nibble_order, asked=("nibble_order",))
    warning = (
        f"layer '{layer.name}': nothing says which nibble comes first; the names are "
        "bitsandbytes', so the high one (verify it against the original, or say that the low one "
        "comes first)"
    )
    return Order("high", (warning,))


def _parsed(text: str) -> dict:
    try:
        parsed = parse(text) if text else {}
    except ValueError:
        return {}
    if isinstance(parsed, dict):
        return parsed
    return {}


def quant_state(layer: StoredLayer, suffix: str) -> tuple[str, dict]:
    """(raw text, object) of a `quant_state` tensor.

    Raises:
        CheckpointError: not JSON.
    """
    spec = layer.specs[suffix]
    if spec.dtype not in ("U8", "I8") or spec.nbytes > MAX_JSON_BYTES:
        raise CheckpointError(f"{suffix} is {spec.dtype} of {spec.nbytes} bytes, JSON is needed")
    text = tensor_text(layer.read(suffix)).decode("utf-8", "replace")
    state = _parsed(text)
    if not state:
        raise CheckpointError(f"{suffix} is not JSON; the file is damaged")
    return text, state


def source_dtype(name: object) -> str | None:
    if name:
        return dtype_from_json(name)
    return None
