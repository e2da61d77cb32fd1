"""`fewbits bench`: how fast every format is on this machine, which kernel runs, and why."""

from __future__ import annotations

import argparse
import json

import torch

from ...kernels.device import CLASSES, Gpu
from ..bench import ROWS, bench_linears, kernel_report, reason_lines
from ..errors import RecipeError
from ..formats import wished_format
from .quantize import pick_device


def run(args: argparse.Namespace) -> None:
    shape = _shape(args.size)
    formats = args.formats and [wished_format(name).name for name in args.formats]
    device = CLASSES[args.gpu] if args.gpu else pick_device(args.device)
    on_cpu = isinstance(device, torch.device) and device.type != "cuda"
    rows = args.rows or ((1, 16, 256) if on_cpu else ROWS)
    if min(rows) < 1:
        raise RecipeError(f"--rows {min(rows)}: at least 1")
    kernels = kernel_report(formats, device, shape=shape, rows=args.rows or ROWS)
    only_say = args.reasons or bool(args.gpu)
    if args.json:
        timed = [] if only_say else bench_linears(device, formats, rows, shape)
        found = {"device": _device_name(device), "kernels": kernels, "linears": timed}
        print(json.dumps(found, indent=2))
        return
    print(f"{_device_name(device)}, torch {torch.__version__}")
    for kernel in kernels:
        print(kernel["text"])
        if only_say:
            print("\n".join(f"    {line}" for line in reason_lines(kernel)))
    if not only_say:
        print(f"\n{shape[0]}x{shape[1]}, milliseconds; x = times as fast\n{HEAD}")
        bench_linears(device, formats, rows, shape, on_row=_print_row)


HEAD = f"{'format':<24}{'rows':>6}{'ms':>10}{'bf16':>10}{'x':>6}{'decoded':>10}{'x':>6}  kernel"


def _print_row(row: dict) -> None:
    ms, dense, decoded = row["ms"], row["bf16_ms"], row["decoded_ms"]
    columns = (
        f"{row['format']:<24}{row['M']:>6}{ms:>10.4f}",
        f"{dense:>10.4f}{dense / ms:>6.2f}{decoded:>10.4f}{decoded / ms:>6.2f}",
        f"  {row['kernel']}",
    )
    print("".join(columns), flush=True)


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = map(int, text.lower().split("x"))
    except ValueError:
        n = k = 0
    if n < 1 or k < 1:
        raise RecipeError(f"--size {text}: write it as NxK, such as 3072x3072")
    return n, k


def _device_name(device: torch.device | Gpu) -> str:
    if isinstance(device, Gpu):
        return f"{device.sm} (such as {device.name})"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
