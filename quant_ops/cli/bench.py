"""`fewbits bench`: how fast every format is on this machine, which kernel runs, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from ...kernels.device import CLASSES, Gpu
from ..bench import CPU_ROWS, CPU_SHAPE, ROWS, SHAPE, bench_linears, kernel_report, reason_lines
from ..errors import RecipeError
from ..formats import wished_format
from .quantize import pick_device


def run(args: argparse.Namespace) -> None:
    formats = args.formats and [wished_format(name).name for name in args.formats]
    device = CLASSES[args.gpu] if args.gpu else pick_device(args.device)
    usual_rows, usual_shape = _usual(device)
    shape = _shape(args.size) if args.size else usual_shape
    rows = args.rows or usual_rows
    if min(rows) < 1:
        raise RecipeError(f"--rows {min(rows)}: at least 1")
    kernels = kernel_report(formats, device, shape=shape, rows=rows)
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
        print(_measured(device, shape), HEAD, sep="\n", flush=True)
        with _progress(len(kernels) * len(rows)) as show:
            bench_linears(device, formats, rows, shape, on_row=show)


def _usual(device: torch.device | Gpu) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Rows of the input and shape of the weight that are asked for by nobody."""
    on_cpu = isinstance(device, torch.device) and device.type == "cpu"
    if on_cpu:
        return (CPU_ROWS, CPU_SHAPE)
    return (ROWS, SHAPE)


def _measured(device: torch.device, shape: tuple[int, int]) -> str:
    """What the rows below say, and what they do not."""
    lines = [
        "",
        f"One layer with random weights of {shape[0]}x{shape[1]} in bf16 and in each format: "
        "milliseconds of one call, the median of several;",
        "decoded = the weight decoded first, then bf16; x = times as fast as the number before it.",
    ]
    if shape == CPU_SHAPE and device.type == "cpu":
        n, k = SHAPE
        lines.append(
            f"This is a small layer, for a CPU; --size {n}x{k} is one of Flux.1, and takes minutes."
        )
    return "\n".join(lines)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[dict], None]]:
    """Prints each row, and on a terminal how many of them are there below it."""
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, unit="row", disable=hidden, leave=False, file=sys.stderr) as bar:

        def show(row: dict) -> None:
            with bar.external_write_mode(file=sys.stderr):
                print(_line(row), flush=True)
            bar.update()

        yield show


HEAD = f"{'format':<24}{'rows':>6}{'ms':>10}{'bf16':>10}{'x':>6}{'decoded':>10}{'x':>6}  kernel"


def _line(row: dict) -> str:
    ms, dense, decoded = row["ms"], row["bf16_ms"], row["decoded_ms"]
    columns = (
        f"{row['format']:<24}{row['M']:>6}{ms:>10.4f}",
        f"{dense:>10.4f}{dense / ms:>6.2f}{decoded:>10.4f}{decoded / ms:>6.2f}",
        f"  {row['kernel']}",
    )
    return "".join(columns)


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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(device)
