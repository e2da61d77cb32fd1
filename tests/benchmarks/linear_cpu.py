"""Linears over stored codes on the CPU against decoding the whole weight first; prints ratios (above 1 is faster).

python tests/benchmarks/linear_cpu.py
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "import_shim")]

import torch

from fewbits.kernels import runtime
from fewbits.kernels.codebook4 import NF4, FlatGrid
from fewbits.kernels.packing import pack_nibbles
from fewbits.quant_ops.bench import median_ms


def main() -> None:
    cpu = torch.device("cpu")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        for n, k in ((3072, 3072), (12288, 3072)):
            weight = torch.randn(n, k) / k**0.5
            grid = FlatGrid(NF4, 64)
            absmax = grid.scale(weight)
            packed = pack_nibbles(grid.encode(weight, absmax), high_first=True)
            for m in (1, 16, 256):
                x = torch.randn(m, k).to(dtype)
                ours = median_ms(
                    [partial(runtime.linear_flat4, x, packed, absmax, NF4, 64, None)], cpu
                )

                def decoded(x=x, packed=packed, absmax=absmax):
                    whole = runtime.dequantize_flat4(packed, absmax, NF4, 64, x.dtype)
                    return torch.nn.functional.linear(x, whole)

                whole = median_ms([decoded], cpu)
                name = str(dtype).removeprefix("torch.")
                print(
                    f"nf4 {n}x{k} M={m:<4} {name:<9}{ours:8.1f} ms, decoded first {whole:8.1f} ms: {whole / ours:.2f}x"
                )


if __name__ == "__main__":
    main()
