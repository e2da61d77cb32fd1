"""Parse and build safetensors headers without torch: 8-byte little-endian length, JSON, then the
data section.

Format description: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..errors import CheckpointError
from ..files import regular_file
from ..spec import ITEM_SIZES, Header, TensorSpec
from ..strict_json import check, shown, unique

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_SIZE = (1 << 63) - 1  # what torch counts elements and bytes with
MAX_RANK = 16  # the largest in use are 5-D convolutions


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: not a file, not safetensors, truncated, overlapping or out-of-range
            tensors, bytes that belong to no tensor, unknown dtype; the message names the tensor
            where there is one.
    """
    path = Path(path)
    size = regular_file(path).st_size
    try:
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
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_header(text, path, data_start=8 + length, file_size=size)


def _not_safetensors(path: Path, size: int, length: int) -> str:
    hint = "pickle files (.ckpt, .pt, .bin) are never loaded; convert to safetensors first"
    return f"{path.name}: not a safetensors file ({size} bytes, header length {length}); {hint}"


def parse_header(text: bytes, path: Path, data_start: int, file_size: int) -> Header:
    """Turn header JSON into a Header; every defect is an error that names the tensor."""
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
        if b"\\u" in text:  # half a character can only be written as an escape
            check(entries)
        metadata = entries.pop("__metadata__", {})
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name}: header is not valid JSON ({error}); the file is damaged"
        ) from None
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
                f"{path.name}: truncated: tensor {shown(name)} ends at byte {data_start + end}, "
                f"the file has {file_size}; download it again"
            )
        tensors[name] = spec
        ranges[name] = (path, data_start + begin, data_start + end)
    _refuse_gaps(path, ranges, data_start, file_size)
    return Header(tensors, metadata, ranges)


def _parse_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    where = f"{path.name}: tensor {shown(name)}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not isinstance(dtype, str) or not lists or not all(map(_is_size, [*shape, *offsets])):
        raise CheckpointError(f"{where} has a malformed header entry; the file is damaged")
    if dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{where} has dtype {shown(dtype)}; readable dtypes: {', '.join(ITEM_SIZES)}"
        )
    if len(shape) > MAX_RANK or math.prod(size or 1 for size in shape) > MAX_SIZE:
        raise CheckpointError(f"{where} has a shape that no memory holds: {shown(shape)}")
    spec = TensorSpec(name, dtype, tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise CheckpointError(
            f"{where} {dtype} {list(shape)} needs {spec.nbytes} bytes, "
            f"its offsets hold {end - begin}; the file is damaged"
        )
    return spec, begin, end


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _refuse_gaps(
    path: Path, ranges: dict[str, tuple[Path, int, int]], data_start: int, file_size: int
) -> None:
    """Every byte after the header belongs to exactly one tensor, as the safetensors library has
    it.
    """
    before, previous_end = "", data_start
    for name, (_, begin, end) in sorted(ranges.items(), key=lambda item: item[1][1:]):
        if begin < previous_end:
            raise CheckpointError(
                f"{path.name}: tensors {shown(before)} and {shown(name)} overlap; the file is "
                "damaged"
            )
        if begin > previous_end:
            raise CheckpointError(
                f"{path.name}: {begin - previous_end} bytes before tensor {shown(name)} belong to "
                "no tensor; the file is damaged"
            )
        before, previous_end = name, end
    if file_size > previous_end:
        raise CheckpointError(
            f"{path.name}: {file_size - previous_end} bytes after the last tensor belong to no "
            "tensor; the file is damaged"
        )


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
