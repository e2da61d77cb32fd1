"""Read checkpoints by byte range: one file, a sharded index, or a folder of shards."""

from __future__ import annotations

import ctypes
import io
import logging
import mmap
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import torch

from ...kernels.memory import Blocks
from ..errors import CheckpointError
from ..files import InputFile, read_text
from ..sources import TORCH_DTYPES, TensorSource
from ..spec import Header, TensorSpec
from ..strict_json import parse, shown
from .header import read_header
from .metadata import MAX_JSON_BYTES

SAMPLE, RUNS = 1 << 16, 4  # bytes that show what a tensor holds, and the places they come from
READ_STEP = 1 << 30  # Linux moves at most 2 GiB a call
REUSED_FROM = 1 << 20  # smaller tensors get memory of their own: the allocator reuses that anyway
# Tensors of these sizes are read into locked memory for a GPU: smaller ones are copied in no time,
# and larger ones would take too much from everybody else.
LOCKED = range(1 << 23, 1 << 28)
# Threads that read one such tensor: 2.7 GB in the page cache to bnb_nf4 took .78 s with one, .56
# with two, .54 with four and with eight; writing the file alone .51 s (H200, 16 cores).
READERS = 4
# bytes per second; what is slower is a disk, and one whose heads move is read by one thread
FAST = 1 << 30
# Older diffusers put the variant last: model.safetensors.index.fp16.json.
INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")

logger = logging.getLogger(__name__)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as a writable byte view, whatever its dtype, without
    numpy.
    """
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(
        tensor.data_ptr()
    )
    array.owner = tensor  # the view must keep the memory alive
    return memoryview(array).cast("B")


def tensor_text(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor that holds JSON, whatever its dtype and device.

    Raises:
        CheckpointError: it is too large for that.
    """
    _refuse_long_text(tensor.nbytes)
    return bytes(tensor_bytes(tensor.detach().cpu().contiguous()))


def stored_text(source: TensorSource, name: str) -> bytes:
    """`tensor_text` of a tensor that is read for it, unless it is too large."""
    _refuse_long_text(source.header.tensors[name].nbytes)
    return tensor_text(source.read(name))


def _refuse_long_text(nbytes: int) -> None:
    if nbytes > MAX_JSON_BYTES:
        raise CheckpointError(f"of {nbytes} bytes; JSON of {MAX_JSON_BYTES} is read at most")


class _LockedBlocks(Blocks):
    """Blocks of one size, in memory that the system may not move: a GPU fetches from it by
    itself.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def _block(self, nbytes: int) -> mmap.mmap | memoryview:
        if self._size:
            try:
                return tensor_bytes(torch.empty(self._size, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:
                # the error itself would keep the frames of its callers, and so tensors
                reason = str(error)
                logger.warning("no locked memory, so copies to the GPU take longer: %s", reason)
                self._size = 0
        return super()._block(nbytes)

    def close(self) -> None:
        """Give the free blocks back; torch would keep them."""
        self._free.clear()
        if self._size and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


class FileSource:
    """A checkpoint on disk.

    `path` may be a `.safetensors` file, a `*.safetensors.index.json`, or a folder that holds either
    an index or one set of shards; a single shard is refused. Reading goes through `readinto`, not a
    memory map: mapped pages would count as resident memory.

    Args:
        short_lived: the tensors that `read` returns are dropped soon, so that their memory is used
            for the next ones. One that is kept may hold more memory than its size.
        for_gpu: many of them are copied to a GPU.

    Raises:
        CheckpointError: anything missing, damaged or ambiguous, by file and tensor name.
    """

    def __init__(
        self, path: str | os.PathLike, *, short_lived: bool = False, for_gpu: bool = False
    ):
        self.path = Path(path)
        self.name = self.path.name
        self.header, self.files = _open_headers(self.path)
        self._files: dict[tuple[Path, int], object] = {}
        self._memory = Blocks() if short_lived else None
        sizes = [spec.nbytes for spec in self.header.tensors.values() if spec.nbytes in LOCKED]
        self._locked = _LockedBlocks(max(sizes)) if short_lived and for_gpu and sizes else None
        self._readers = ThreadPoolExecutor(READERS, "fewbits-readers") if self._locked else None
        self._fast = True  # as far as the last such tensor showed

    def _empty(self, spec: TensorSpec) -> torch.Tensor:
        dtype = TORCH_DTYPES[spec.dtype]
        if self._memory is None or spec.nbytes < REUSED_FROM:
            return torch.empty(spec.shape, dtype=dtype)
        memory = self._locked if self._locked and spec.nbytes in LOCKED else self._memory
        return memory.tensor(spec.nbytes).view(dtype).view(spec.shape)

    def read(self, name: str) -> torch.Tensor:
        spec = self.header.tensors[name]
        path, begin, end = self.header.ranges[name]
        tensor = self._empty(spec)
        if begin == end:
            return tensor
        view = tensor_bytes(tensor)
        done = (
            self._fill_large(path, begin, view)
            if spec.nbytes in LOCKED
            else self._fill(path, 0, begin, view)
        )
        if done < len(view):
            raise CheckpointError(
                f"{path.name}: truncated while reading tensor '{name}': {done} of {len(view)} bytes"
            )
        return tensor

    def sample(self, name: str) -> torch.Tensor:
        """A few runs of a tensor's elements, evenly spread and SAMPLE bytes in all; the whole of a
        small one. 1-D, of the tensor's dtype.
        """
        spec = self.header.tensors[name]
        if spec.nbytes <= SAMPLE:
            return self.read(name).reshape(-1)
        path, begin, _ = self.header.ranges[name]
        run = SAMPLE // RUNS
        taken = torch.empty(SAMPLE, dtype=torch.uint8)
        for index, view in enumerate(taken.split(run)):
            at = (spec.nbytes - run) * index // (RUNS - 1) // 16 * 16  # whole elements
            if self._fill(path, 0, begin + at, tensor_bytes(view)) < run:
                raise CheckpointError(f"{path.name}: truncated while reading tensor '{name}'")
        return taken.view(TORCH_DTYPES[spec.dtype])

    def _fill_large(self, path: Path, begin: int, view: memoryview) -> int:
        """`_fill`, by several threads where that is worth it."""
        lanes = READERS if self._readers and self._fast else 1
        step = -(-len(view) // lanes)
        pieces = [(lane, begin + lane * step, view[lane * step :][:step]) for lane in range(lanes)]
        started = time.perf_counter()
        done = sum(
            (self._readers.map if lanes > 1 else map)(self._fill, repeat(path), *zip(*pieces))
        )
        self._fast = done >= FAST * (time.perf_counter() - started)
        return done

    def _fill(self, path: Path, lane: int, begin: int, view: memoryview) -> int:
        """Read from byte `begin` on until the view is full or the file ends; a lane is used by one
        thread at a time.

        Returns:
            Bytes read.
        """
        file = self._files.get((path, lane))
        if file is None:
            file = self._files[path, lane] = _open(path)
        done = 0
        try:
            file.seek(begin)
            while done < len(view):
                count = file.readinto(view[done : done + READ_STEP])
                if not count:
                    break
                done += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        return done

    def close(self) -> None:
        if self._readers:
            self._readers.shutdown()
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._locked:
            self._locked.close()

    def __enter__(self) -> FileSource:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _open(path: Path) -> io.FileIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened any more ({error.strerror}); it was there at the start"
        ) from None


def _open_headers(path: Path) -> tuple[Header, tuple[InputFile, ...]]:
    """What is in a checkpoint, and the files that hold it, an index among them."""
    if os.path.isdir(path):
        indexes = sorted(file for file in path.iterdir() if INDEX.search(file.name))
        if len(indexes) != 1:
            return _merge_shards(path, _shards_of_folder(path, len(indexes)))
        return _read_index(path, indexes[0])
    if INDEX.search(path.name) or path.name.endswith(".index.json"):
        return _read_index(path, path)
    file = InputFile.found(path)
    number, total = _place(path)
    if total > 1:
        raise CheckpointError(
            f"{path.name}: part {number} of {total} of a model; name its folder, or its "
            "*.safetensors.index.json"
        )
    return read_header(path), (file,)


def _place(path: Path) -> tuple[int, int]:
    """`model-00002-of-00003.safetensors` -> (2, 3); (1, 1) for a file that is no shard."""
    found = SHARD.search(path.name)
    if found:
        return (int(found[1]), int(found[2]))
    return (1, 1)


def _shards_of_folder(folder: Path, indexes: int) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if indexes or not files:
        found = f"{indexes} indexes" if indexes else "no .safetensors files"
        raise CheckpointError(f"{folder}: {found}; name one file or one *.safetensors.index.json")
    total = max(total for _, total in map(_place, files))
    if total not in (1, len(files)):
        raise CheckpointError(
            f"{folder}: {len(files)} .safetensors files, and one of them says that it is one of "
            f"{total}; get the others, or name one file"
        )
    return files


def _read_index(path: Path, index: Path) -> tuple[Header, tuple[InputFile, ...]]:
    file = InputFile.found(index)
    weight_map = _weight_map(index)
    names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        raise CheckpointError(
            f"{index.name}: shard {shown(missing[0])} is missing "
            f"({len(missing)} of {len(names)} not found)"
        )
    header, files = _merge_shards(path, [index.parent / name for name in names])
    lost = [name for name in weight_map if name not in header.tensors]
    if lost:
        raise CheckpointError(
            f"{index.name}: no shard holds tensor {shown(lost[0])}, which the index says is in "
            f"{weight_map[lost[0]]} ({len(lost)} of {len(weight_map)} not found); a shard is of "
            "another model, or damaged"
        )
    return header, (file, *files)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of the shard that holds it."""
    try:
        weight_map = parse(read_text(index, CheckpointError))["weight_map"]
        names = weight_map.values()
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a shard's name must be text")
        if not names:
            raise ValueError("it names no tensor")
        if any(Path(name).name != name or "\0" in name for name in names):
            raise ValueError("shard names must be plain file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name}: not a safetensors index ({error})") from None
    return weight_map


def _merge_shards(path: Path, shards: list[Path]) -> tuple[Header, tuple[InputFile, ...]]:
    merged = Header({}, {}, {})
    warnings = []
    files = tuple(InputFile.found(shard) for shard in shards)
    for shard in shards:
        header = read_header(shard)
        twice = next((name for name in header.tensors if name in merged.tensors), None)
        if twice is not None:
            first = merged.ranges[twice][0].name
            raise CheckpointError(
                f"{path.name}: tensor {shown(twice)} is in {first} and in {shard.name}; remove one "
                "of them"
            )
        merged.tensors.update(header.tensors)
        merged.ranges.update(header.ranges)
        for key, value in header.metadata.items():
            if merged.metadata.setdefault(key, value) != value:
                warnings.append(
                    f"metadata '{key}' differs in {shard.name}; the first shard's value is kept"
                )
    return Header(merged.tensors, merged.metadata, merged.ranges, tuple(warnings)), files
