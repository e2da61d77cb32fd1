"""`fewbits bench`: how fast every format is on this machine, which kernel runs, and why."""

from __future__ import annotations

import argparse
import json

import torch

from ..bench import ROWS, SHAPE, bench_linears, kernel_report
from ..errors import RecipeError
from ..formats import get_format
from .quantize import pick_device


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench", help="time every format on this machine, and say which kernel runs and why"
    )
    parser.add_argument(
        "--format", dest="formats", action="append", metavar="F", help="only this one; repeatable"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        help=f"rows of the input (default {' '.join(map(str, ROWS))})",
    )
    size = "x".join(map(str, SHAPE))
    parser.add_argument(
        "--size", default=size, metavar="NxK", help=f"the layer's weight (default {size})"
    )
    parser.add_argument(
        "--reasons", action="store_true", help="only say which kernel runs; time nothing"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda when there is one), cpu, cuda, cuda:1"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    device, shape = pick_device(args.device), _shape(args.size)
    for name in args.formats or ():
        get_format(name)
    rows = args.rows or (ROWS if device.type == "cuda" else (1, 16, 256))
    if min(rows) < 1:
        raise RecipeError(f"--rows {min(rows)}: at least 1")
    kernels = kernel_report(args.formats, device, shape=shape)
    if not args.json:
        print(f"{_device_name(device)}, torch {torch.__version__}")
        print("\n".join(kernel["text"] for kernel in kernels))
    timed = []
    if not args.reasons:
        if not args.json:
            print(f"\n{shape[0]}x{shape[1]}, milliseconds; x = times as fast\n{HEAD}")
        timed = bench_linears(
            device, args.formats, rows, shape, on_row=_silent if args.json else _print_row
        )
    if args.json:
        print(
            json.dumps(
                {"device": _device_name(device), "kernels": kernels, "linears": timed}, indent=2
            )
        )


HEAD = f"{'format':<24}{'rows':>6}{'ms':>10}{'bf16':>10}{'x':>6}{'decoded':>10}{'x':>6}  kernel"


def _print_row(row: dict) -> None:
    print(
        f"{row['format']:<24}{row['M']:>6}{row['ms']:>10.4f}{row['bf16_ms']:>10.4f}{row['bf16_ms'] / row['ms']:>6.2f}"
        f"{row['decoded_ms']:>10.4f}{row['decoded_ms'] / row['ms']:>6.2f}  {row['kernel']}",
        flush=True,
    )


def _silent(row: dict) -> None:
    pass


def _shape(text: str) -> tuple[int, int]:
    try:
        n, k = map(int, text.lower().split("x"))
    except ValueError:
        n = k = 0
    if n < 1 or k < 1:
        raise RecipeError(f"--size {text}: write it as NxK, such as 3072x3072")
    return n, k


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
