"""Files of other writers, built from a float weight or from golden codes: one function per dialect; and what ours read."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fewbits.quant_ops.checkpoint.importers.source import ImportedSource
from fewbits.quant_ops.checkpoint.reader import FileSource
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.sources import DTYPE_NAMES
from fewbits.quant_ops.spec import LayerInput

FP4_BY_MAGNITUDE = (0, 0.00520833, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)
TO_MAGNITUDE = {
    0: 0,
    1: 1,
    6: 2,
    7: 3,
    4: 4,
    5: 5,
    2: 6,
    3: 7,
}  # bitsandbytes' FP4 code -> rank of its magnitude
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TABLE = (0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
TABLES = {"nf4": NF4_TABLE, "fp4": (*FP4_TABLE, *(-v for v in FP4_TABLE))}


def json_tensor(value: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def native(
    name: str, weight: torch.Tensor, **options: object
) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by suffix, marker) of one of our own formats."""
    format = get_format(name)
    options = format.configure(options)
    layer = LayerInput(tuple(weight.shape), DTYPE_NAMES[weight.dtype])
    prepared = format.prepare(weight, options)
    grid = format.grid(layer, options)
    scale = grid.scale(prepared)
    return format.pack(grid.encode(prepared, scale), scale, options), format.marker(layer, options)


def under(
    base: str, tensors: dict[str, torch.Tensor], marker: object = None
) -> dict[str, torch.Tensor]:
    """Suffixes as full names, with the JSON beside them."""
    named = {f"{base}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return named if marker is None else {**named, f"{base}.comfy_quant": json_tensor(marker)}


def swapped(packed: torch.Tensor) -> torch.Tensor:
    return (packed << 4) | (packed >> 4)


def bitsandbytes(
    base: str, weight: torch.Tensor, kind: str = "nf4", group: int = 64
) -> dict[str, torch.Tensor]:
    """bitsandbytes from our codes (golden vectors prove them equal); a float32 weight is said to have been bfloat16."""
    stored, _ = native(f"bnb_{kind}", weight, block_size=group)
    state = {
        "quant_type": kind,
        "blocksize": group,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    return {
        f"{base}.weight": stored["weight"].reshape(-1, 1),
        f"{base}.weight.absmax": stored["absmax"],
        f"{base}.weight.quant_map": torch.tensor(TABLES[kind]),
        f"{base}.weight.quant_state.bitsandbytes__{kind}": json_tensor(state),
    }


def nested(base: str, weight: torch.Tensor, kind: str = "nf4") -> dict[str, torch.Tensor]:
    """Nested absmax, written by bitsandbytes itself."""
    import bitsandbytes.functional

    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=True
    )
    pieces = {f"{base}.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {f"{base}.weight": codes, **pieces}


def d30(base: str, weight: torch.Tensor, kind: str = "nf4") -> dict[str, torch.Tensor]:
    """bitsandbytes' names, low nibble first, FP4 by magnitude."""
    stored, _ = native(f"bnb_{kind}", weight)
    packed, table = stored["weight"], TABLES[kind]
    if kind == "fp4":
        rank = [TO_MAGNITUDE[code & 7] | code & 8 for code in range(16)]
        packed = torch.tensor(
            [rank[b >> 4] << 4 | rank[b & 15] for b in packed.reshape(-1).tolist()],
            dtype=torch.uint8,
        )
        table = (*FP4_BY_MAGNITUDE, *(-v for v in FP4_BY_MAGNITUDE))
    state = {"dtype": "bfloat16", "shape": list(weight.shape), "blocksize": 64, "quant_type": kind}
    return {
        f"{base}.weight": swapped(packed).reshape(-1, 1),
        f"{base}.weight.absmax": stored["absmax"],
        f"{base}.weight.quant_map": torch.tensor(table),
        f"{base}.weight.quant_state.bitsandbytes__{kind}": json_tensor(state),
    }


def d14(base: str, weight: torch.Tensor, kind: str = "nf4") -> dict[str, torch.Tensor]:
    """Flat, low nibble first, no shape in the JSON; a bias says N."""
    stored, _ = native(f"bnb_{kind}", weight)
    marker = {"format": f"bnb_{kind}", "params": {"group_size": 64}}
    flat = {"weight": swapped(stored["weight"]).reshape(-1), "absmax": stored["absmax"]}
    return {**under(base, flat, marker), f"{base}.bias": torch.zeros(len(weight))}


def d19(base: str, weight: torch.Tensor, kind: str = "nf4") -> dict[str, torch.Tensor]:
    stored, _ = native(f"bnb_{kind}", weight)
    marker = {
        "format": f"bnb_{kind}", "group_size": 64, "quant_type": kind, "dtype": "bfloat16",
        "shape": list(weight.shape), "quant_map": list(TABLES[kind]), "params": {"group_size": 64},
    }  # fmt: skip
    return under(
        base, {"weight": swapped(stored["weight"]).reshape(-1), "absmax": stored["absmax"]}, marker
    )


def d19_legacy(base: str, weight: torch.Tensor, kind: str = "nf4") -> dict[str, torch.Tensor]:
    stored, _ = native(f"bnb_{kind}", weight)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        f"{base}.weight": swapped(stored["weight"]).reshape(-1),
        f"{base}.absmax": stored["absmax"],
        f"{base}.quant_map": torch.tensor(TABLES[kind]),
        f"{base}.quant_state.bitsandbytes__{kind}": json_tensor(state),
    }


def int8_fast(
    base: str, weight: torch.Tensor, convrot: int | None = None
) -> dict[str, torch.Tensor]:
    """JSON without `format`."""
    options = {"convrot": True, "convrot_groupsize": convrot} if convrot else {}
    stored, _ = native("int8_tensorwise", weight, **options)
    marker = {
        "convrot": bool(convrot),
        **({"convrot_groupsize": convrot} if convrot else {}),
        "per_row": True,
    }
    return under(base, stored, marker)


def scaled_fp8(
    base: str, weight: torch.Tensor, dtype: str = "float8_e4m3fn"
) -> dict[str, torch.Tensor]:
    """Scaled FP8 of one layer, without the file's marker."""
    stored, _ = native(dtype, weight)
    return {
        f"{base}.weight": stored["weight"],
        f"{base}.scale_weight": stored["weight_scale"].reshape(1),
    }


def decoded(path: Path) -> torch.Tensor:
    """Layer `a` of a file in float32, as our doors read it."""
    with (
        FileSource(path) as file,
        ImportedSource(file, retarget=lambda made: made.decoded("F32", "")) as opened,
    ):
        return opened.read("a.weight").float()
