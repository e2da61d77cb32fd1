"""Read the header of a GGUF file by bounded steps: no number in it decides alone how much is read.

    magic "GGUF", version u32, number of tensors u64, number of keys u64
    key: text, type u32, value          text: length u64, UTF-8
    tensor: name (text), rank u32, sizes u64 x rank, kind u32, offset u64
    padding to `general.alignment` (32), then the data that offsets count from

Format description: the page "GGUF" of the ggml project, https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from ..strict_json import shown
from .header import MAX_HEADER_BYTES, MAX_RANK

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, ORIGINAL_SHAPE = "general.alignment", "comfy.gguf.orig_shape."
# type -> how struct reads one; text and lists are read otherwise
NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TEXT, LIST = 8, 9
MAX_DEPTH = 4  # of lists in lists; files in use have one level


@dataclass(frozen=True)
class GgufEntry:
    """One tensor as the header has it: its kind's number, sizes with the innermost first, and the
    first byte of its data in the file.
    """

    kind: int
    sizes: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class GgufHeader:
    """Tensors by name, and the shapes that flattened ones had."""

    tensors: dict[str, GgufEntry]
    original_shapes: dict[str, tuple[int, ...]]


def read_gguf_header(path: Path, size: int) -> GgufHeader:
    """Read the header of one file of `size` bytes; values that nothing here needs are passed over.

    Raises:
        CheckpointError: not GGUF, another version, damaged, or a header larger than 100 MB.
    """
    try:
        with open(path, "rb") as file:
            return _read(_Steps(file, min(size, MAX_HEADER_BYTES)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path.name}: not a GGUF file, or damaged ({error}); get it again"
        ) from None


class _Steps:
    """Reads forward and never past the end.

    Raises:
        ValueError: more is wanted than there is.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self.at = file, size, 0

    def _advance(self, count: int) -> None:
        if count > self._size - self.at:
            raise ValueError(f"{count} bytes at byte {self.at} lie outside")
        self.at += count

    def take(self, count: int) -> bytes:
        self._advance(count)
        data = self._file.read(count)
        if len(data) < count:
            raise ValueError("it has become shorter")
        return data

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, 1)

    def numbers(self, code: str, count: int = 1) -> tuple:
        width = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{count}{code}", self.take(width * count))

    def number(self, code: str) -> int:
        return self.numbers(code)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")


def _read(steps: _Steps) -> GgufHeader:
    if steps.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = steps.number("I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; 2 and 3 are read")
    tensor_count, key_count = steps.numbers("Q", 2)
    values = _read_keys(steps, key_count)
    entries = _read_entries(steps, tensor_count)
    alignment = values.pop(ALIGNMENT, (32,))[0]
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment!r} is no power of two")
    start = -(-steps.at // alignment) * alignment
    tensors = {
        name: GgufEntry(kind, sizes, start + offset)
        for name, (kind, sizes, offset) in entries.items()
    }
    return GgufHeader(tensors, {key[len(ORIGINAL_SHAPE) :]: shape for key, shape in values.items()})


def _read_keys(steps: _Steps, count: int) -> dict[str, tuple]:
    """Numbers of the keys that are needed."""
    seen: set[str] = set()
    wanted: dict[str, tuple] = {}
    for _ in range(count):
        key, kind = steps.text(), steps.number("I")
        if key in seen:
            raise ValueError(f"key {shown(key)} appears twice")
        seen.add(key)
        if key == ALIGNMENT or key.startswith(ORIGINAL_SHAPE):
            wanted[key] = _numbers(steps, key, kind)
        else:
            _pass_over(steps, kind)
    return wanted


def _numbers(steps: _Steps, key: str, kind: int) -> tuple:
    """One number, or a short list of them."""
    count = 1
    if kind == LIST:
        kind, count = steps.number("I"), steps.number("Q")
    if kind not in NUMBERS or not 1 <= count <= MAX_RANK:
        raise ValueError(f"{shown(key)} is no size and no list of sizes")
    return steps.numbers(NUMBERS[kind], count)


def _pass_over(steps: _Steps, kind: int, depth: int = 0) -> None:
    if kind in NUMBERS:
        steps.skip(struct.calcsize(f"<{NUMBERS[kind]}"))
    elif kind == TEXT:
        steps.skip(steps.number("Q"))
    elif kind == LIST and depth < MAX_DEPTH:
        inner, count = steps.number("I"), steps.number("Q")
        if inner in NUMBERS:
            steps.skip(count * struct.calcsize(f"<{NUMBERS[inner]}"))
            return
        for _ in range(count):  # each has a length of its own, so the file's end ends this
            _pass_over(steps, inner, depth + 1)
    else:
        raise ValueError(f"a value of unknown type {kind}, or lists nested too deeply")


def _read_entries(steps: _Steps, count: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
    entries: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(count):
        name, rank = steps.text(), steps.number("I")
        if name in entries:
            raise ValueError(f"tensor {shown(name)} appears twice")
        if rank > MAX_RANK:
            raise ValueError(f"tensor {shown(name)} has {rank} dimensions")
        sizes = steps.numbers("Q", rank)
        entries[name] = (steps.number("I"), sizes, steps.number("Q"))
    return entries
