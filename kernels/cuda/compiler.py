"""Compile CUDA C++ with NVRTC and launch it on torch's current stream; one compile per kernel, options and GPU kind.

torch.cuda's own run-time compiler looks for a CUDA toolkit, which users do not have.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import sys
import time
from functools import cache

import torch

logger = logging.getLogger(__name__)


def _library(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """torch has it loaded, or finds it beside its own libraries."""
    major = (torch.version.cuda or "0").split(".")[0]
    if sys.platform == "win32":
        return _library((f"nvrtc64_{major}0_0.dll",))
    return _library((f"libnvrtc.so.{major}",))


@cache
def _driver() -> ctypes.CDLL | None:
    return _library(("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1",))


def why_not_compile() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    if _nvrtc() is None:
        return f"NVRTC {torch.version.cuda} was not found beside torch"
    return None if _driver() is not None else "the CUDA driver library was not found"


def compile_cubin(source: str, architecture: str, options: tuple[str, ...] = ()) -> bytes:
    """CUDA C++ -> machine code for e.g. `sm_90`; needs no GPU.

    Raises:
        RuntimeError: the compiler's log.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    flags = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", *(option.encode() for option in options)]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"fewbits.cu", 0, None, None)
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        size = ctypes.c_size_t()
        if status:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC could not compile a FewBits kernel: {log.value.decode(errors='replace')}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _cubin(source: str, architecture: str, options: tuple[str, ...]) -> bytes:
    begin = time.perf_counter()
    cubin = compile_cubin(source, architecture, options)
    logger.info("compiled a kernel for %s in %.1f s (once)", architecture, time.perf_counter() - begin)
    return cubin


MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PACKED, PACKED_SIZE, END = 1, 2, 0  # CU_LAUNCH_PARAM_*: the arguments come as one run of bytes


class Kernel:
    """One entry point on one GPU, whose blocks use `shared` bytes of dynamic shared memory."""

    def __init__(self, source: str, name: str, options: tuple[str, ...], device: int, shared: int):
        major, minor = torch.cuda.get_device_capability(device)
        self._function, self._module, self._device, self._shared = ctypes.c_void_p(), ctypes.c_void_p(), device, shared
        cubin = _cubin(source, f"sm_{major}{minor}", options)
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes torch's context current on this thread
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), cubin))
            _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
            _check(_driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED, shared))

    def launch(self, grid: tuple[int, int, int], threads: int, layout: struct.Struct, *arguments: int) -> None:
        """Start it on the device's current stream; `layout` packs the arguments, pointers first."""
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                return self.launch(grid, threads, layout, *arguments)
        packed = layout.pack(*arguments)
        size = ctypes.c_size_t(len(packed))
        extra = (ctypes.c_void_p * 5)(
            PACKED, ctypes.cast(packed, ctypes.c_void_p), PACKED_SIZE, ctypes.addressof(size), END
        )
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        return _check(_driver().cuLaunchKernel(self._function, *grid, threads, 1, 1, self._shared, stream, None, extra))


@cache
def kernel(source: str, name: str, options: tuple[str, ...], device: int, shared: int = 0) -> Kernel:
    """The entry point, compiled and loaded on first use."""
    return Kernel(source, name, options, device, shared)


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")
