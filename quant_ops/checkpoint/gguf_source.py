"""A GGUF file as a TensorSource: every quantized tensor decoded while it is read.

The blocks are decoded by the `gguf` package, which is an extra (pip install comfyui-fewbits[gguf]).
Tensors keep their names; files of ComfyUI-GGUF have ComfyUI's own. Text encoders under llama.cpp's
names are refused: ComfyUI reads none of those names.

| stored | read as |
|---|---|
| F32, F16, BF16, F64, I8 ... I64 | itself |
| any block format | BF16 in the header, float32 when read: codes are chosen from exact values |
| sizes in reverse order | rows first; `comfy.gguf.orig_shape.NAME` where a tensor was flattened |
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files import InputFile
from ..sources import DTYPE_NAMES
from ..spec import Header, TensorSpec

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
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
LLAMA_CPP = "token_embd.weight"  # every text encoder under llama.cpp's names has it


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
        self.files = (InputFile.found(self.path),)
        try:
            self._reader = gguf.GGUFReader(self.path)
        except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
            raise CheckpointError(
                f"{self.name}: not a GGUF file, or damaged ({error}); get it again"
            ) from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        if LLAMA_CPP in self._tensors:
            raise CheckpointError(
                f"{self.name}: a text encoder under llama.cpp's names ('{LLAMA_CPP}'), which "
                "ComfyUI does not know; start from its safetensors file"
            )
        specs = {name: self._spec(name) for name in self._tensors}
        whole = dict.fromkeys(specs, (self.path, 0, 0))
        self.header = Header(specs, {}, whole)

    def _spec(self, name: str) -> TensorSpec:
        tensor = self._tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        stated = self._reader.fields.get(ORIGINAL_SHAPE + name)
        if stated is not None:
            shape = tuple(int(stated.parts[index][0]) for index in stated.data)
        kind = tensor.tensor_type.name
        dtype = DTYPE_NAMES[PLAIN[kind]] if kind in PLAIN else DECODED
        spec = TensorSpec(name, dtype, shape)
        if spec.numel != int(tensor.n_elements):
            raise CheckpointError(
                f"{self.name}: tensor '{name}' has {int(tensor.n_elements)} elements, its shape "
                f"{list(shape)} needs {spec.numel}; the file is damaged"
            )
        return spec

    def read(self, name: str) -> torch.Tensor:
        tensor, spec = self._tensors[name], self.header.tensors[name]
        kind = tensor.tensor_type.name
        if kind in PLAIN:
            raw = torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(-1)
            return raw.view(PLAIN[kind]).reshape(spec.shape)
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: tensor '{name}' is {kind}, which the gguf package does not decode "
                f"({error})"
            ) from None
        return torch.from_numpy(values).float().reshape(spec.shape)

    def origins(self) -> dict[str, int]:
        """Block format and what becomes of it -> number of tensors."""
        kinds = Counter(tensor.tensor_type.name for tensor in self._tensors.values())
        return {
            f"gguf: {kind} decoded": count for kind, count in kinds.items() if kind not in PLAIN
        }

    def close(self) -> None:
        self._tensors.clear()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
