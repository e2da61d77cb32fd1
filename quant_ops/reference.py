"""A second decoder of every format, in numpy, written from the format's description alone.

`decode(marker, tensors)` takes raw bytes, so that dtypes numpy lacks are read here too. Nothing of
FewBits or torch is imported. Products are rounded to float32 one by one; rotations are matrix
products in float64.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Stored(NamedTuple):
    """One tensor as a file holds it: safetensors dtype name, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _small_float(byte: int, exponent_bits: int, mantissa_bits: int, nan_only: bool) -> float:
    sign = -1.0 if byte >> 7 else 1.0
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = byte & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    top = (1 << exponent_bits) - 1
    if exponent == top and nan_only and mantissa == (1 << mantissa_bits) - 1:
        return float("nan")
    if exponent == top and not nan_only:
        if mantissa == 0:
            return sign * float("inf")
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


E4M3 = np.array([_small_float(byte, 4, 3, True) for byte in range(256)], np.float32)
E5M2 = np.array([_small_float(byte, 5, 2, False) for byte in range(256)], np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
     -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
_FP4 = np.array([0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12], np.float32)
FP4 = np.concatenate([_FP4, -_FP4])


def _array(stored: Stored) -> np.ndarray:
    """Values as float32 (integers stay integers, E8M0 and packed bytes stay bytes)."""
    kinds = {"F32": np.float32, "I8": np.int8}
    if stored.dtype in ("F8_E4M3", "F8_E5M2"):
        table = E4M3 if stored.dtype == "F8_E4M3" else E5M2
        return table[np.frombuffer(stored.data, np.uint8)].reshape(stored.shape)
    return np.frombuffer(stored.data, kinds.get(stored.dtype, np.uint8)).reshape(stored.shape)


def _nibbles(stored: Stored, high_first: bool) -> np.ndarray:
    packed = np.frombuffer(stored.data, np.uint8).reshape(stored.shape)
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2] = packed >> 4 if high_first else packed & 15
    codes[:, 1::2] = packed & 15 if high_first else packed >> 4
    return codes


def _logical_scales(stored: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Undo the swizzle by its offset formula, one index at a time."""
    flat, quarter = stored.reshape(-1), stored.shape[1] // 4
    r, c = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    return flat[
        ((r // 128) * quarter + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    ]


def hadamard(group: int) -> np.ndarray:
    h4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)
    h = h4
    while len(h) < group:
        h = np.kron(h, h4)
    return h / np.sqrt(group)


def rotate(x: np.ndarray, group: int) -> np.ndarray:
    return (x.astype(np.float64).reshape(-1, group) @ hadamard(group).T).reshape(x.shape)


def _tiles(x: np.ndarray, scale: np.ndarray, rows: int, cols: int) -> np.ndarray:
    return x * np.repeat(np.repeat(scale, rows, 0), cols, 1)


def decode(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    """(N, K) of one layer; float32, or float64 where a rotation was undone.

    Raises:
        ValueError: a format that is not in DECODERS.
    """
    name = marker["format"]
    if name not in DECODERS:
        raise ValueError(f"it has no decoder for {name!r}")
    return DECODERS[name](marker, tensors)


def _per_tensor(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    assert tensors["weight_scale"].shape == ()
    return _array(tensors["weight"]) * _array(tensors["weight_scale"])


def _per_row(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    return _array(tensors["weight"]) * _array(tensors["weight_scale"])[:, None]


def _per_block(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    weight, size = _array(tensors["weight"]).astype(np.float32), marker["group_size"]
    return _tiles(weight, _array(tensors["weight_scale"]), size, size)


def _per_group(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    weight = _array(tensors["weight"]).astype(np.float32)
    scale = _array(tensors["weight_scale"]).reshape(len(weight), -1)
    return _tiles(weight, scale, 1, marker["group_size"])


def _int8(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    weight, scale = _array(tensors["weight"]), _array(tensors["weight_scale"])
    assert scale.shape in ((), (len(weight), 1))
    decoded = weight.astype(np.float32) * scale
    if marker.get("convrot"):
        return rotate(decoded, marker["convrot_groupsize"])
    return decoded


def _w4a4(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    codes = _nibbles(tensors["weight"], high_first=False).astype(np.int8)
    codes = np.where(codes > 7, codes - 16, codes).astype(np.float32)
    return rotate(codes * _array(tensors["weight_scale"])[:, None], marker["convrot_groupsize"])


def _bnb(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    assert marker["nibble_order"] == "high"
    codes = _nibbles(tensors["weight"], high_first=True).reshape(-1)
    absmax = _array(tensors["absmax"])
    values = (NF4 if marker["format"] == "bnb_nf4" else FP4)[codes]
    blocks = np.arange(len(codes)) // marker["group_size"]
    return (values * absmax[blocks]).reshape(marker["shape"])


def _mxfp8(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    codes = _array(tensors["weight"])
    exponents = _logical_scales(
        _array(tensors["weight_scale"]), codes.shape[0], codes.shape[1] // 32
    )
    scale = np.where(exponents == 0, 0.0, 2.0 ** (exponents.astype(np.float64) - 127)).astype(
        np.float32
    )
    n, k = marker.get("orig_shape", codes.shape)
    return _tiles(codes, scale, 1, 32)[:n, :k]


def _nvfp4(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    values = E2M1[_nibbles(tensors["weight"], high_first=True)]
    block = _logical_scales(_array(tensors["weight_scale"]), values.shape[0], values.shape[1] // 16)
    n, k = marker.get("orig_shape", values.shape)
    return _tiles(values, _array(tensors["weight_scale_2"]) * block, 1, 16)[:n, :k]


def _w4a8(marker: dict, tensors: dict[str, Stored]) -> np.ndarray:
    levels = _array(tensors["weight_codebook"])[_nibbles(tensors["weight"], high_first=False)]
    grid = np.clip(
        np.rint(_tiles(levels, _array(tensors["weight_s_rel"]), 1, marker["group_size"])), -127, 127
    )
    return rotate(grid * _array(tensors["weight_s_channel"])[:, None], marker["convrot_groupsize"])


DECODERS: dict[str, Callable[[dict, dict[str, Stored]], np.ndarray]] = {
    "float8_e4m3fn": _per_tensor,
    "float8_e5m2": _per_tensor,
    "float8_e4m3fn_rowwise": _per_row,
    "float8_e4m3fn_blockwise": _per_block,
    "float8_e4m3fn_block3d": _per_group,
    "int8_tensorwise": _int8,
    "int8_blockwise": _per_block,
    "int8_lodewise": _per_group,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "convrot_w4a4": _w4a4,
    "asym_w4a8_int8": _w4a8,
    "bnb_nf4": _bnb,
    "bnb_fp4": _bnb,
}


def read_layers(path: Path) -> Iterator[tuple[str, dict, dict[str, Stored]]]:
    """(base name, marker, tensors by suffix) of every quantized layer of a safetensors file, one at
    a time.

    Raises:
        ValueError: the markers of the file's header and of the layers differ.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        text = header.pop("__metadata__", {}).get("_quantization_metadata", '{"layers": {}}')
        names: dict[str, list[str]] = {}
        for name in header:
            names.setdefault(name.rpartition(".")[0], []).append(name)
        for base, marker in json.loads(text)["layers"].items():
            stored = {}
            for name in names[base]:
                entry = header[name]
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                data = file.read(end - begin)
                stored[name[len(base) + 1 :]] = Stored(entry["dtype"], tuple(entry["shape"]), data)
            if json.loads(stored["comfy_quant"].data) != marker:
                raise ValueError(f"layer {base!r}: its JSON and the file header's differ")
            yield base, marker, stored


def decode_file(path: Path) -> dict[str, np.ndarray]:
    """Every quantized layer of a safetensors file: base name -> (N, K)."""
    return {base: decode(marker, stored) for base, marker, stored in read_layers(path)}
