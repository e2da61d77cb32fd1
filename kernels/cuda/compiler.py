"""Compile CUDA C++ with NVRTC and launch it on torch's current stream; one compile per kernel,
options and GPU kind.

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

from ..device import gpu_at

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
    if _driver() is None:
        return "the CUDA driver library was not found"
    if hasattr(_driver(), LAUNCH):
        return None
    return "the CUDA driver is older than 11.8"


def compile_cubin(source: str, architecture: str, options: tuple[str, ...] = ()) -> bytes:
    """CUDA C++ -> machine code for e.g. `sm_90`; needs no GPU.

    Raises:
        RuntimeError: the compiler's log.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    flags = [
        f"--gpu-architecture={architecture}".encode(),
        b"--std=c++17",
        *(option.encode() for option in options),
    ]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"fewbits.cu", 0, None, None)
    try:
        status = nvrtc.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
        )
        size = ctypes.c_size_t()
        if status:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(
                f"NVRTC could not compile a FewBits kernel: {log.value.decode(errors='replace')}"
            )
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
    logger.info(
        "compiled a kernel for %s in %.1f s (once)", architecture, time.perf_counter() - begin
    )
    return cubin


# CUtensorMapDataType
MAP_TYPES = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
SWIZZLE_128B, FETCH_256B = 3, 3


def encode_tensor_map(
    address: int,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    pitch: int,
    box: tuple[int, int],
    swizzle: bool,
) -> bytes:
    """How the copy engine of a GPU reads boxes of (rows, columns) of a matrix; what lies outside
    reads as zero.

    Args:
        address: a multiple of 16 bytes.
        pitch: bytes from row to row, a multiple of 16.
        swizzle: spread the 16-byte pieces of each 128 bytes over the banks of shared memory.
    """
    storage = ctypes.create_string_buffer(128 + 64)
    made = (ctypes.addressof(storage) + 63) & ~63
    matrix = (
        MAP_TYPES[dtype],
        2,  # dimensions, the fastest first
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(pitch),
    )
    boxes = ((ctypes.c_uint32 * 2)(*box[::-1]), (ctypes.c_uint32 * 2)(1, 1))
    how = (0, SWIZZLE_128B if swizzle else 0, FETCH_256B, 0)
    _check(_driver().cuTensorMapEncodeTiled(ctypes.c_void_p(made), *matrix, *boxes, *how))
    return ctypes.string_at(made, 128)


@cache
def _launcher() -> ctypes._CFuncPtr:
    """cuLaunchKernelEx: its configuration is made once, where cuLaunchKernel takes eleven arguments
    at each call and 1.8 us longer.
    """
    start = _driver()[LAUNCH]
    start.argtypes = (
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_void_p,
    )
    return start


LAUNCH = "cuLaunchKernelEx"
ONE_POINTER = ctypes.c_char_p * 1  # to bytes, which it keeps alive
CONFIGURATION = struct.Struct("7I4xQQI4x")  # CUlaunchConfig
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernel:
    """One entry point on one GPU, whose blocks use `shared` bytes of dynamic shared memory."""

    def __init__(self, source: str, name: str, options: tuple[str, ...], device: int, shared: int):
        self.function, self._module = ctypes.c_void_p(), ctypes.c_void_p()
        self.device, self.shared = device, shared
        cubin = _cubin(source, gpu_at(device).architecture, options)
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes torch's context current on this thread
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), cubin))
            _check(
                _driver().cuModuleGetFunction(
                    ctypes.byref(self.function), self._module, name.encode()
                )
            )
            _check(_driver().cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED, shared))

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        layout: struct.Struct,
        *arguments: int | bytes,
    ) -> None:
        """Start it on the device's current stream; `layout` packs its one argument, a struct."""
        Launch(self, grid, threads)(layout.pack(*arguments))


class Launch:
    """A kernel with its grid and threads: called with its argument's bytes, it starts on the
    device's current stream.
    """

    __slots__ = ("_configured", "_grid", "_kernel", "_start", "_threads")

    def __init__(self, kernel: Kernel, grid: tuple[int, int, int], threads: int):
        self._kernel, self._grid, self._threads = kernel, grid, threads
        self._start = _launcher()
        self._configured: tuple[int | None, bytes] = (
            None,
            b"",
        )  # of the stream that it was last on

    def __call__(self, packed: bytes) -> None:
        kernel = self._kernel
        if torch._C._cuda_getDevice() != kernel.device:
            with torch.cuda.device(kernel.device):
                return self(packed)
        stream = torch._C._cuda_getCurrentRawStream(kernel.device)
        last, configuration = self._configured
        if last != stream:
            blocks = (*self._grid, self._threads, 1, 1, kernel.shared)
            configuration = CONFIGURATION.pack(*blocks, stream, 0, 0)
            self._configured = stream, configuration
        status = self._start(configuration, kernel.function, ONE_POINTER(packed), None)
        if status:
            return _check(status)
        return None


@cache
def kernel(
    source: str, name: str, options: tuple[str, ...], device: int, shared: int = 0
) -> Kernel:
    """The entry point, compiled and loaded on first use."""
    return Kernel(source, name, options, device, shared)


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")
