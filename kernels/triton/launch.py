"""Start a Triton kernel without asking Triton anew what the call compiles to: that was remembered
by what decides it.

Microseconds of Python per launch on one core, 9 arguments (Triton 3.6): `kernel[grid](...)` 10.6,
this 2.9.
"""

from __future__ import annotations

import logging
import time

import torch
import triton

logger = logging.getLogger(__name__)

# Where a compiled kernel's `run` takes (grid, stream, function, metadata, hooks, every argument in
# order).
DIRECT = tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 4), (3, 5), (3, 6))

# Seconds that a first launch takes before it is worth a line. Of 143 kernels compiling takes .05 to
# 1.1 s on one core, taking them from Triton's cache .001.
LOGGED = 0.04

_COMPILED: dict[tuple, object] = {}


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    *numbers: int | float | bool,
    num_warps: int,
    num_stages: int = 3,
) -> None:
    """`kernel[grid](*tensors, *numbers, num_warps=..., num_stages=...)` on the tensors' GPU and its
    current stream.

    Args:
        tensors: the kernel's first arguments.
        numbers: all its other arguments in order, constants included. Each new combination goes
            through Triton once, which then may hold on to facts such as "a multiple of 16".
    """
    device = tensors[0].get_device()  # -1 on the CPU, where only Triton's interpreter runs
    if device >= 0 and torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return launch(
                kernel, grid, tensors, *numbers, num_warps=num_warps, num_stages=num_stages
            )
    # What Triton compiles for: types, the value of each number, and whether an address is a
    # multiple of 16.
    facts = [(tensor.dtype, tensor.data_ptr() & 15 == 0) for tensor in tensors]
    key = (id(kernel), device, num_warps, num_stages, numbers, *facts)
    compiled = _COMPILED.get(key)
    if compiled is None or not DIRECT:
        begin = time.perf_counter()
        found = kernel[grid](*tensors, *numbers, num_warps=num_warps, num_stages=num_stages)
        seconds = time.perf_counter() - begin
        if compiled is None and found is not None:  # Triton's interpreter compiles nothing
            _COMPILED[key] = found
            if seconds > LOGGED:
                name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__.lstrip('_')}"
                logger.info(
                    "first use of the Triton kernel %s took %.1f s: compiled, then cached",
                    name,
                    seconds,
                )
        return None
    # of profilers
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    stream = torch._C._cuda_getCurrentRawStream(device)
    what = compiled.launch_metadata(grid, stream, *tensors, *numbers)
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, what, *hooks, *tensors, *numbers
    )
    return None
