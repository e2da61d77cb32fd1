"""File conversion on a GPU against what bounds it, in turns: writing the output to storage, copying over PCIe.

    python tests/benchmarks/conversion_gpu.py [--blocks 3] [--formats float8_e4m3fn,bnb_nf4] [--repeats 5] [--folder DIR]

Appends to results/conversion_gpu.csv. `of_bound`: the slower of the two bounds over our time; the file is in the page
cache, torch and CUDA are started, kernels compiled. Pageable memory is what a file read without the page cache's pages
being locked is copied from; the bound is of locked memory. `read_s`, no bound: one thread reading the file into memory
that is used again. With `--device cpu` storage alone is the bound.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

from support import bench_layers as gpu
import torch
from files import flux_shapes, write_model
from linear import append

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

RESULTS = Path(__file__).parent / "results" / "conversion_gpu.csv"
FORMATS = (
    "float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "float8_e4m3fn_block3d", "int8_tensorwise",
    "int8_tensorwise:convrot=true", "int8_blockwise", "int8_lodewise", "bnb_nf4", "bnb_fp4:method=nearest", "mxfp8",
    "nvfp4", "convrot_w4a4", "asym_w4a8_int8", "bnb_fp4",
)  # fmt: skip
PIECE = 64 * 2**20  # bytes of one copy


def stored(path: Path, data: torch.Tensor, size: int) -> float:
    """Seconds to write `size` bytes and have them on storage."""
    view = memoryview(data.numpy())
    begin = time.perf_counter()
    with open(path, "wb") as file:
        for start in range(0, size, PIECE):
            file.write(view[: min(PIECE, size - start)])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


def copied(host: torch.Tensor, device: torch.Tensor, there: int, back: int) -> float:
    """Seconds to copy so many bytes to the GPU and back, at the same time."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for (target, origin), size, stream in zip(
        ((device[0], host[0]), (host[1], device[1])), (there, back), streams
    ):
        with torch.cuda.stream(stream):
            for start in range(0, size, PIECE):
                count = min(PIECE, size - start)
                target[:count].copy_(origin[:count], non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def read(path: Path) -> float:
    """Seconds to read a file into memory that is used again."""
    view = memoryview(bytearray(PIECE))
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(view):
            pass
    return time.perf_counter() - begin


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0


def measure(folder: Path, model: Path, wish: str, repeats: int, on: str) -> dict:
    out, size = folder / "out.safetensors", model.stat().st_size
    on_gpu = on == "cuda"
    pageable, device = (
        torch.ones(2, PIECE, dtype=torch.uint8, device=where) for where in ("cpu", on)
    )
    locked = pageable.pin_memory() if on_gpu else None
    found: dict[str, list[float]] = {
        "seconds": [],
        "read_s": [],
        "write_s": [],
        "pcie_s": [],
        "pageable_s": [],
    }
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = resident()
    for _ in range(repeats + 1):  # the first compiles kernels
        begin = time.perf_counter()
        quantize_file(model, out, Recipe(primary=parse_wish(wish)), device=on, overwrite=True)
        found["seconds"].append(time.perf_counter() - begin)
        written = out.stat().st_size
        out.unlink()
        found["read_s"].append(read(model))
        found["write_s"].append(stored(out, pageable[0], written))
        if on_gpu:
            found["pcie_s"].append(copied(locked, device, size, written))
            found["pageable_s"].append(copied(pageable, device, size, written))
    medians = {
        name: statistics.median(values[1:]) if values else None for name, values in found.items()
    }
    bound = max(medians["write_s"], medians["pcie_s"] or 0.0)
    return {
        "on": on,
        "format": wish,
        "bytes": size,
        "written": written,
        **medians,
        "of_bound": round(bound / medians["seconds"], 3),
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "rss_before_bytes": before,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--blocks", type=int, default=3, help="file size in units of 0.9 GB")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work (needs twice the file size)")
    args = parser.parse_args()
    if args.device == "cuda":
        gpu.end_without_gpu()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="fewbits-bench-") as folder:
        model = Path(folder) / "model.safetensors"
        write_model(model, flux_shapes(args.blocks))
        for wish in args.formats.split(","):
            row = measure(Path(folder), model, wish, args.repeats, args.device)
            print(", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in row.items()), flush=True)  # fmt: skip
            append(RESULTS, [row])


if __name__ == "__main__":
    main()
