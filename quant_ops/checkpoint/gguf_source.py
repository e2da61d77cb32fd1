"""A GGUF file as a TensorSource: every quantized tensor decoded while it is read.

The blocks are decoded by the `gguf` package, which is an extra (pip install comfyui-fewbits[gguf]);
the header is not read by it: its reader follows every count in it, beyond the file's end too.
Tensors keep their names; files of ComfyUI-GGUF have ComfyUI's own. Text encoders under llama.cpp's
names are refused: ComfyUI reads none of those names.

| stored | read as |
|---|---|
| F32, F16, BF16, F64, I8 ... I64 | itself |
| any block format | BF16 in the header, float32 when read: codes are chosen from exact values |
| sizes in reverse order | rows first; `comfy.gguf.orig_shape.NAME` where a tensor was flattened |
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError
from ..files import InputFile
from ..sources import DTYPE_NAMES
from ..spec import ITEM_SIZES, Header, TensorSpec
from ..strict_json import shown
from .gguf_header import GgufEntry, read_gguf_header
from .header import MAX_SIZE

try:
    import gguf
except ImportError:  # an extra: nothing else needs it
    gguf = None

SUFFIX = ".gguf"
PLAIN = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
DECODED = "BF16"
# Names of llama.cpp: text encoders, and the vision and sound towers beside them (mmproj).
LLAMA_CPP = re.compile(r"token_embd\.weight|((enc|dec|v|a)\.)?blk\.\d+\..*|mm\.\d+\.weight")


@dataclass(frozen=True)
class Stored:
    """Bytes of one tensor: `kind` is the package's name of its blocks, `rows` their shape in bytes
    (in elements for numbers).
    """

    kind: str
    rows: tuple[int, ...]
    begin: int
    end: int


class GgufSource:
    """A GGUF file to read from.

    Raises:
        CheckpointError: the package is missing, the file is damaged, or its names are llama.cpp's.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.name = self.path.name
        if gguf is None:
            raise CheckpointError(
                f"{self.name}: GGUF files need the package gguf (pip install gguf)"
            )
        file = InputFile.found(self.path)
        self.files = (file,)
        found = read_gguf_header(self.path, file.state.st_size)
        foreign = next(filter(LLAMA_CPP.fullmatch, found.tensors), None)
        if foreign is not None:
            raise CheckpointError(
                f"{self.name}: a text encoder, or a part of one, under llama.cpp's names "
                f"({shown(foreign)}), which ComfyUI does not know; start from its safetensors file"
            )
        self._stored = {name: self._place(name, entry) for name, entry in found.tensors.items()}
        self._refuse_outside(file.state.st_size)
        specs = {}
        for name, entry in found.tensors.items():
            shape = found.original_shapes.get(name, tuple(reversed(entry.sizes)))
            specs[name] = self._spec(name, entry, shape)
        self.header = Header(specs, {}, dict.fromkeys(specs, (self.path, 0, 0)))

    def _place(self, name: str, entry: GgufEntry) -> Stored:
        shape = tuple(reversed(entry.sizes))
        try:
            kind = gguf.GGMLQuantizationType(entry.kind)
        except ValueError:
            raise CheckpointError(
                f"{self.name}: tensor {shown(name)} is of kind {entry.kind}, which gguf "
                "does not know; a newer one may"
            ) from None
        if math.prod(size or 1 for size in shape) > MAX_SIZE:
            raise self._damaged(name, f"a shape that no memory holds: {shown(list(shape))}")
        if kind.name in PLAIN:
            nbytes = math.prod(shape) * ITEM_SIZES[DTYPE_NAMES[PLAIN[kind.name]]]
            return Stored(kind.name, shape, entry.begin, entry.begin + nbytes)
        block, width = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise self._damaged(name, f"shape {list(shape)}, {kind.name} has blocks of {block}")
        rows = (*shape[:-1], shape[-1] // block * width)
        return Stored(kind.name, rows, entry.begin, entry.begin + math.prod(rows))

    def _refuse_outside(self, size: int) -> None:
        """Every tensor has bytes of its own in the file; what lies between them fills up blocks."""
        before, previous_end = "", 0
        for name, stored in sorted(self._stored.items(), key=lambda item: item[1].begin):
            if stored.end > size:
                raise self._damaged(name, f"bytes up to {stored.end}, the file has {size}")
            if stored.begin < previous_end:
                raise self._damaged(name, f"bytes that {shown(before)} has too")
            if stored.end > stored.begin:
                before, previous_end = name, stored.end

    def _spec(self, name: str, entry: GgufEntry, shape: tuple[int, ...]) -> TensorSpec:
        if not all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape):
            raise self._damaged(name, f"the shape {shown(list(shape))}")
        kind = self._stored[name].kind
        dtype = DTYPE_NAMES[PLAIN[kind]] if kind in PLAIN else DECODED
        spec = TensorSpec(name, dtype, shape)
        if spec.numel != math.prod(entry.sizes):
            what = f"{math.prod(entry.sizes)} elements, its shape {list(shape)} needs {spec.numel}"
            raise self._damaged(name, what)
        return spec

    def _damaged(self, name: str, has: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: tensor {shown(name)} has {has}; the file is damaged")

    def read(self, name: str) -> torch.Tensor:
        stored, spec = self._stored[name], self.header.tensors[name]
        data = self._bytes(name, stored)
        if stored.kind in PLAIN:
            return data.view(PLAIN[stored.kind]).reshape(spec.shape)
        kind = gguf.GGMLQuantizationType[stored.kind]
        try:
            # codes of a damaged file may overflow; NaN and Inf are refused by whoever quantizes
            with np.errstate(all="ignore"):
                values = gguf.quants.dequantize(data.numpy().reshape(stored.rows), kind)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: tensor {shown(name)} is {stored.kind}, which the gguf package does "
                f"not decode ({error})"
            ) from None
        return torch.from_numpy(values).float().reshape(spec.shape)

    def _bytes(self, name: str, stored: Stored) -> torch.Tensor:
        """(bytes,) uint8."""
        data = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(stored.begin)
                count = file.readinto(data.numpy())
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        if count < len(data):
            raise self._damaged(name, f"{count} of {len(data)} bytes")
        return data

    def origins(self) -> dict[str, int]:
        """Block format and what becomes of it -> number of tensors."""
        kinds = Counter(stored.kind for stored in self._stored.values())
        return {
            f"gguf: {kind} decoded": count for kind, count in kinds.items() if kind not in PLAIN
        }

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
