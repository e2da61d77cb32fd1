"""Where tensors come from and where they go, and the in-memory versions of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from .files import InputFile
from .spec import Header, ModelPlan, TensorSpec

TORCH_DTYPES = {
    "C64": torch.complex64, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


# Layer -> sum of the squares of its stored weights, measured before they were packed.
Norms = Mapping[str, float]


class TensorSource(Protocol):
    """A model to read: a header known at once, tensors on demand.

    `files` are those it comes from, which no sink may write to.
    """

    name: str
    header: Header
    files: tuple[InputFile, ...]

    def read(self, name: str) -> torch.Tensor:
        """One tensor with the dtype and shape of `header.tensors[name]`, never to be changed in
        place.

        A weight that was computed just now (a LoRA baked in) may be float32 instead: what is
        quantized is quantized from that, what is kept is rounded to the header's dtype.
        """


class TensorSink(Protocol):
    """Somewhere to put tensors. `open` once, `write` every planned tensor in any order, then
    `commit`, told what was measured of quantized layers, or `abort`.
    """

    def open(self, plan: ModelPlan, inputs: Iterable[InputFile] = ()) -> None: ...

    def write(self, name: str, tensor: torch.Tensor) -> None: ...

    def commit(self, norms: Norms = MappingProxyType({})) -> None: ...

    def abort(self) -> None: ...


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The TensorSpec of a torch tensor."""
    return TensorSpec(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


class MemorySource:
    """A dict of tensors as a source; `read` hands out the tensors themselves."""

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
        name: str = "model",
        files: Iterable[InputFile] = (),
    ):
        self.name = name
        self.files = tuple(files)
        self.tensors = tensors
        self.header = Header(
            {key: spec_of(key, tensor) for key, tensor in tensors.items()}, dict(metadata or {})
        )

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class MemorySink:
    """Collects the written tensors, in main memory, and the metadata, in file order."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] = {}

    def open(self, plan: ModelPlan, inputs: Iterable[InputFile] = ()) -> None:
        self.metadata = dict(plan.metadata)
        self.tensors = dict.fromkeys(spec.name for spec in plan.outputs)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor.detach().cpu().contiguous()

    def commit(self, norms: Norms = MappingProxyType({})) -> None:
        pass

    def abort(self) -> None:
        self.tensors, self.metadata = {}, {}
