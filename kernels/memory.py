"""Fresh memory for large tensors of a CPU, in pages of 2 MB where the system has them.

The system clears a page when it is first touched. 0.9 GB took it 0.83 s in pages of 4 KB, 1.35 s
where the mapping was shared, 0.13 s in pages of 2 MB (one core).
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

LARGE = 1 << 22  # bytes; below, the allocator has used memory


def pages(nbytes: int) -> mmap.mmap:
    """Zeroed memory of this process."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, nbytes)
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.empty`."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(pages(nbytes), dtype=torch.uint8).view(dtype).view(shape)
