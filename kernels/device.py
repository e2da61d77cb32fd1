"""What kernels ask of a GPU: of one that is here once, of one that is not by its class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

BLOCK_BYTES = 99 * 1024  # shared memory that a block can have on every GPU since sm_80


@dataclass(frozen=True)
class Gpu:
    """One GPU, or a class of them.

    `shared_bytes`: shared memory that one block can have. `here`: whether it is in this machine;
    only then does it count what is installed.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    amd: bool = False
    here: bool = True

    @property
    def sm(self) -> str:
        """`sm_90`."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def architecture(self) -> str:
        """What to compile for; what only Hopper has is behind a name of its own."""
        if self.capability == (9, 0):
            return "sm_90a"
        return self.sm

    @property
    def float8(self) -> bool:
        """Whether it rounds to FP8 as torch does, and multiplies FP8 codes."""
        return self.capability >= (8, 9)

    @property
    def clusters(self) -> bool:
        """Whether blocks form clusters."""
        return self.capability >= (9, 0)

    @property
    def wgmma(self) -> bool:
        """Whether tensor cores read shared memory themselves, by Hopper's own instructions."""
        return self.capability == (9, 0)


# One GPU of each class, from the vendor's data sheets; asked about by `as_if`.
CLASSES = {
    gpu.sm: gpu
    for gpu in (
        Gpu("RTX 2080 Ti", (7, 5), 68, 64 * 1024, here=False),
        Gpu("A100", (8, 0), 108, 163 * 1024, here=False),
        Gpu("RTX 3090", (8, 6), 82, BLOCK_BYTES, here=False),
        Gpu("RTX 4090", (8, 9), 128, BLOCK_BYTES, here=False),
        Gpu("H200", (9, 0), 132, 227 * 1024, here=False),
        Gpu("B200", (10, 0), 148, 227 * 1024, here=False),
        Gpu("RTX 5090", (12, 0), 170, BLOCK_BYTES, here=False),
    )
}
_ASSUMED: list[Gpu] = []


@cache
def gpu_at(index: int) -> Gpu:
    """The GPU of this number in this machine."""
    facts = torch.cuda.get_device_properties(index)
    return Gpu(
        name=facts.name,
        capability=(facts.major, facts.minor),
        multiprocessors=facts.multi_processor_count,
        shared_bytes=getattr(facts, "shared_memory_per_block_optin", BLOCK_BYTES),
        amd=torch.version.hip is not None,
    )


def gpu_of(tensor: torch.Tensor) -> Gpu | None:
    """The GPU a tensor lies on, inside `as_if` that of a tensor without storage; None elsewhere."""
    if tensor.device.type == "cuda":
        return gpu_at(tensor.device.index or 0)
    if _ASSUMED and tensor.device.type == "meta":
        return _ASSUMED[-1]
    return None


@contextlib.contextmanager
def as_if(gpu: Gpu) -> Iterator[None]:
    """Tensors on the device `meta` count as lying on this GPU."""
    _ASSUMED.append(gpu)
    try:
        yield
    finally:
        _ASSUMED.pop()


def assumed() -> Gpu | None:
    """The GPU of the innermost `as_if`."""
    if _ASSUMED:
        return _ASSUMED[-1]
    return None


def why_not(tensor: torch.Tensor, least: tuple[int, int], amd: str) -> str | None:
    """Why kernels for NVIDIA GPUs from a compute capability on cannot take this tensor; None when
    they can.

    Args:
        amd: what is said of an AMD GPU.
    """
    gpu = gpu_of(tensor)
    if gpu is None:
        return f"tensor is on {tensor.device.type}"
    if tensor.numel() == 0:
        return "tensor is empty"
    if gpu.amd:
        return f"AMD GPU: {amd}"
    if gpu.capability < least:
        return f"{gpu.sm} is older than sm_{least[0]}{least[1]}"
    return None
