"""Write checkpoints: every tensor to its planned place in a temporary sibling, verified, flushed,
then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import CheckpointError
from ..files import InputFile, refuse_as_output
from ..part import PartFile, remove_leftovers
from ..sources import Norms, spec_of
from ..spec import ModelPlan, TensorSpec
from .fingerprint import Fingerprint
from .header import build_header
from .reader import tensor_bytes

# Bytes after which written data is flushed, so that the disk works while the next layers are
# computed: for 0.9 GB the flush at the end alone took 0.35 s of 4.5.
FLUSH_STEP = 1 << 26
UNFLUSHED = 2 * FLUSH_STEP  # most that waits for a slow disk, and that a cancelled run waits for
# bytes of locked memory through which tensors of a GPU come: 20 times as fast as into fresh memory
STAGING = 1 << 25


class FileSink:
    """A safetensors file that appears complete or not at all.

    Bytes go to a `PartFile` beside the target. `commit` checks that every planned tensor was
    written once, that no input changed meanwhile, reads the header and samples of every tensor
    back, flushes to disk and renames. A process that is killed leaves at most the hidden part,
    which the next one removes; never the target.

    Args:
        check: called with the finished part, and what `commit` was given, before it is published;
            what it raises keeps the target as it was.
        whole: read every byte back instead of samples.
        replacing: called right before it is published: what speaks of an older file must go first.

    Raises:
        CheckpointError: existing output without `overwrite`, missing or unwritable folder, full
            disk, or an output that is one of the inputs.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        overwrite: bool = False,
        check: Callable[[Path, Norms], None] | None = None,
        whole: bool = False,
        replacing: Callable[[], None] = lambda: None,
    ):
        self.path = Path(path)
        self.overwrite = overwrite
        self._check, self._replacing, self._whole = check, replacing, whole
        self._part: PartFile | None = None
        self._inputs: tuple[InputFile, ...] = ()
        self._pending: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._header = b""
        self._written: dict[str, Fingerprint] = {}
        self._unflushed = 0
        self._flusher = ThreadPoolExecutor(1, "fewbits-flush")
        self._flush: Future | None = None  # the last one; writing goes on meanwhile
        check_target(self.path, overwrite)

    def open(self, plan: ModelPlan, inputs: Iterable[InputFile] = ()) -> None:
        self._inputs = tuple(inputs)
        refuse_as_output(self._inputs, self.path)
        header, self._offsets = build_header(plan.outputs, plan.metadata)
        self._header = header
        self._pending = {spec.name: spec for spec in plan.outputs}
        self._size = len(header) + sum(spec.nbytes for spec in plan.outputs)
        remove_leftovers(self.path.parent)
        free = shutil.disk_usage(self.path.parent).free
        if free < self._size:
            raise CheckpointError(
                f"{self.path.name}: the disk is full: {self._size} bytes are needed in "
                f"{self.path.parent}, {free} are free"
            )
        with self._explain():
            self._part = PartFile(self.path)
            self._part.raw.truncate(self._size)
            self._put(memoryview(header))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        spec = self._pending.pop(name)
        if type(tensor) is not torch.Tensor or spec_of(name, tensor) != spec:
            got = f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{self.path.name}: tensor '{name}' was planned as {spec.dtype} {spec.shape}, got "
                f"{got}"
            )
        with self._explain(name):
            self._part.raw.seek(self._offsets[name])
            self._written[name] = seen = Fingerprint(spec.nbytes, self._whole)
            for piece in _on_host(tensor.detach()):
                self._put(piece)
                seen.add(piece)
            self._unflushed += tensor.nbytes
            self._flush_meanwhile()

    def commit(self, norms: Norms = MappingProxyType({})) -> None:
        if self._pending:
            missing = ", ".join(list(self._pending)[:3])
            raise CheckpointError(
                f"{self.path.name}: {len(self._pending)} tensors were never written ({missing})"
            )
        with self._explain():
            if self._flush:
                self._flush.result()
        self._flusher.shutdown()
        self._read_back()
        self._refuse_changed_inputs()  # what was made of such a file may have any fault
        if self._check:
            try:
                self._check(self._part.path, norms)
            except CheckpointError as error:
                raise error.at(self.path.name) from error
        self._refuse_changed_inputs()
        refuse_as_output(self._inputs, self.path)
        check_target(self.path, self.overwrite)
        self._replacing()
        with self._explain():
            self._part.publish()
        self._part = None

    def _refuse_changed_inputs(self) -> None:
        for file in self._inputs:
            file.refuse_change()

    def _read_back(self) -> None:
        """
        Raises:
            CheckpointError: the file is not what was written to it.
        """
        with open(self._part.path, "rb") as file:
            same = os.fstat(file.fileno()).st_size == self._size
            if not same or file.read(len(self._header)) != self._header:
                raise CheckpointError(
                    f"{self.path.name}: the header or the size does not read back as written; "
                    "nothing was kept: write to another disk"
                )
            for name, seen in self._written.items():
                if not seen.is_of(file, self._offsets[name]):
                    raise CheckpointError(
                        f"{self.path.name}: tensor '{name}' does not read back as written; nothing "
                        "was kept: write to another disk"
                    )

    def _flush_meanwhile(self) -> None:
        running = self._flush and not self._flush.done()
        if self._unflushed < (UNFLUSHED if running else FLUSH_STEP):
            return
        if self._flush:
            self._flush.result()
        self._flush = self._flusher.submit(os.fsync, self._part.raw.fileno())
        self._unflushed = 0

    def abort(self) -> None:
        self._flusher.shutdown(cancel_futures=True)  # before its file is closed
        if self._part is not None:
            self._part.discard()
            self._part = None

    def _put(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._part.raw.write(view[done : done + (1 << 30)])

    @contextlib.contextmanager
    def _explain(self, tensor: str | None = None):
        try:
            yield
        except OSError as error:
            where = f"{self.path.name}: tensor '{tensor}'" if tensor else str(self.path)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise CheckpointError(
                    f"{where}: the disk is full ({error.strerror}); nothing was kept"
                ) from None
            raise CheckpointError(f"{where}: cannot be written: {error.strerror}") from None


def _on_host(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, each piece valid until the next."""
    tensor = tensor.contiguous()
    if tensor.device.type != "cuda":
        yield tensor_bytes(tensor.cpu())
        return
    there = tensor.reshape(-1).view(torch.uint8)
    here = torch.empty(min(len(there), STAGING), dtype=torch.uint8, pin_memory=True)
    for piece in there.split(STAGING):
        yield tensor_bytes(here[: len(piece)].copy_(piece))


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse an output path before any work: existing file, missing or unwritable folder, wrong
    suffix, a name that the system does not take.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: an output file must end in .safetensors")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{str(path)!r}: cannot be a file's name: {reason}") from None
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder; create it first")
    if path.exists() and not overwrite:
        raise CheckpointError(
            f"{path}: exists already; choose another name or allow overwriting", option="overwrite"
        )
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(f"{path.parent}: folder is not writable; choose another one")
