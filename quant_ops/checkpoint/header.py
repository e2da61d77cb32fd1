"""Parse and build safetensors headers without torch: 8-byte little-endian length, JSON, then the
data section.

Format description: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import CheckpointError
from ..spec import ITEM_SIZES, Header, TensorSpec

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: not a file, not safetensors, truncated, overlapping or out-of-range
            tensors, unknown dtype; the message names the tensor where there is one.
    """
    path = Path(path)
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES or length < 2:
                raise CheckpointError(_not_safetensors(path, size, length))
            if 8 + length > size:
                raise CheckpointError(
                    f"{path.name}: truncated: the header needs {8 + length} bytes, the file has "
                    f"{size}; get it again"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_header(text, path, data_start=8 + length, file_size=size)


def _not_safetensors(path: Path, size: int, length: int) -> str:
    hint = "pickle files (.ckpt, .pt, .bin) are never loaded; convert to safetensors first"
    return f"{path.name}: not a safetensors file ({size} bytes, header length {length}); {hint}"


def parse_header(text: bytes, path: Path, data_start: int, file_size: int) -> Header:
    """Turn header JSON into a Header; every defect is an error that names the tensor."""
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name}: header is not valid JSON ({error}); the file is damaged"
        ) from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(
            f"{path.name}: __metadata__ must map strings to strings; the file is damaged"
        )
    tensors: dict[str, TensorSpec] = {}
    ranges: dict[str, tuple[Path, int, int]] = {}
    for name, entry in entries.items():
        spec, begin, end = _parse_entry(path, name, entry)
        if data_start + end > file_size:
            raise CheckpointError(
                f"{path.name}: truncated: tensor '{name}' ends at byte {data_start + end}, the "
                f"file has {file_size}; download it again"
            )
        tensors[name] = spec
        ranges[name] = (path, data_start + begin, data_start + end)
    _refuse_overlaps(path, ranges)
    return Header(tensors, metadata, ranges)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return result


def _parse_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path.name}: tensor '{name}' has a malformed header entry; the file is damaged"
        ) from None
    if dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{path.name}: tensor '{name}' has dtype {dtype!r}; readable dtypes: "
            f"{', '.join(ITEM_SIZES)}"
        )
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - begin != spec.nbytes:
        raise CheckpointError(
            f"{path.name}: tensor '{name}' {dtype} {list(shape)} needs {spec.nbytes} bytes, "
            f"its offsets hold {end - begin}; the file is damaged"
        )
    return spec, begin, end


def _refuse_overlaps(path: Path, ranges: dict[str, tuple[Path, int, int]]) -> None:
    last_end, last_name = 0, ""
    for name, (_, begin, end) in sorted(ranges.items(), key=lambda item: (item[1][1], item[1][2])):
        if begin < last_end and end > begin:
            raise CheckpointError(
                f"{path.name}: tensors '{last_name}' and '{name}' overlap; the file is damaged"
            )
        last_end, last_name = max(last_end, end), name


def build_header(
    specs: tuple[TensorSpec, ...], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Header bytes (length prefix included, padded so that data starts 8-byte aligned) and absolute
    tensor offsets.

    Tensors are laid out without holes in the order given; metadata keys are sorted, so equal input
    gives equal bytes.
    """
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = dict(sorted(metadata.items()))
    offset = 0
    relative: dict[str, int] = {}
    for spec in specs:
        if spec.name in relative:
            raise CheckpointError(f"tensor '{spec.name}' would be written twice")
        relative[spec.name] = offset
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header would have {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}"
        )
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: start + begin for name, begin in relative.items()
    }
