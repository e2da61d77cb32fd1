"""Read checkpoints by byte range: one file, a sharded index, or a folder of shards."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..sources import TORCH_DTYPES
from ..spec import Header
from .header import read_header

READ_STEP = 1 << 30  # Linux moves at most 2 GiB a call


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as a writable byte view, whatever its dtype, without numpy."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    array.owner = tensor  # the view must keep the memory alive
    return memoryview(array).cast("B")


class FileSource:
    """A checkpoint on disk.

    `path` may be a `.safetensors` file, a `*.safetensors.index.json`, or a folder that holds either an index or one
    set of shards. Reading goes through `readinto`, not a memory map: mapped pages would count as resident memory.

    Raises:
        CheckpointError: anything missing, damaged or ambiguous, by file and tensor name.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.name = self.path.name
        self.header = _open_header(self.path)
        self._files: dict[Path, object] = {}

    def read(self, name: str) -> torch.Tensor:
        spec = self.header.tensors[name]
        path, begin, end = self.header.ranges[name]
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        if begin == end:
            return tensor
        view = tensor_bytes(tensor)
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close())
        file.seek(begin)
        done = 0
        while done < len(view):
            count = file.readinto(view[done : done + READ_STEP])
            if not count:
                raise CheckpointError(
                    f"{path.name}: truncated while reading tensor '{name}': {done} of {len(view)} bytes"
                )
            done += count
        return tensor

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _open_header(path: Path) -> Header:
    if path.is_dir():
        return _merge_shards(path, _shards_of_folder(path))
    if path.name.endswith(".index.json"):
        return _merge_shards(path, _shards_of_index(path))
    return read_header(path)


def _shards_of_folder(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _shards_of_index(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    if indexes or not files:
        found = f"{len(indexes)} indexes" if indexes else "no .safetensors files"
        raise CheckpointError(f"{folder}: {found}; name one file or one *.safetensors.index.json")
    return files


def _shards_of_index(path: Path) -> list[Path]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("shard names must be plain file names")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: not a safetensors index ({error})") from None
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path.name}: shard {missing[0]} is missing ({len(missing)} of {len(names)} not found)")
    return [path.parent / name for name in names]


def _merge_shards(path: Path, shards: list[Path]) -> Header:
    merged = Header({}, {}, {})
    warnings = []
    for shard in shards:
        header = read_header(shard)
        twice = next((name for name in header.tensors if name in merged.tensors), None)
        if twice is not None:
            first = merged.ranges[twice][0].name
            raise CheckpointError(
                f"{path.name}: tensor '{twice}' is in {first} and in {shard.name}; remove one of them"
            )
        merged.tensors.update(header.tensors)
        merged.ranges.update(header.ranges)
        for key, value in header.metadata.items():
            if merged.metadata.setdefault(key, value) != value:
                warnings.append(f"metadata '{key}' differs in {shard.name}; the first shard's value is kept")
    return Header(merged.tensors, merged.metadata, merged.ranges, tuple(warnings))
