"""The kernel tables of README.md, from the CSVs that the benchmarks of a GPU wrote.

`FEWBITS_WRITE_TABLES=1 python3 dev.py test tests/cli/test_bench.py` writes them into the README.
"""

from __future__ import annotations

import csv
import math
import textwrap
from collections import defaultdict

from .emoji import ROOT

RESULTS = ROOT / "tests" / "benchmarks" / "results"
FLUX = {(12288, 3072), (3072, 12288), (3072, 15360)}
FORMATS = {
    "fp8 row": "`float8_e4m3fn_rowwise`", "fp8 block 128": "`float8_e4m3fn_blockwise`, 128",
    "fp8 block 64": "`float8_e4m3fn_blockwise`, 64", "int8 row": "`int8_tensorwise`, rows",
    "int8 block 128": "`int8_blockwise`, 128", "int8 block 64": "`int8_blockwise`, 64",
    "int8 group 128": "`int8_lodewise`, 128", "nf4 64": "`bnb_nf4`, 64", "fp4 64": "`bnb_fp4`, 64",
}  # fmt: skip
WEIGHT = "12288x3072"


def rows_of(name: str) -> list[dict]:
    """The rows of a CSV; of several runs of a case the last."""
    with open(RESULTS / name, newline="", encoding="utf-8") as file:
        rows = {tuple(row.get(key) for key in ("kind", "what", "N", "K", "M")): row for row in csv.DictReader(file)}
    return list(rows.values())


def mean(values: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def linear_table() -> str:
    rows = [row for row in rows_of("linear.csv") if (int(row["N"]), int(row["K"])) in FLUX]
    counts = sorted({int(row["M"]) for row in rows})
    found: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        speeds = (float(row["bf16_ms"]) / float(row["ms"]), float(row["bf16_plain_ms"]) / float(row["plain_ms"]))
        found[row["kind"], int(row["M"])].append(speeds)
    lines = ["| format | " + " | ".join(f"M = {m}" for m in counts) + " |", "|---|" + "---|" * len(counts)]
    for kind, label in FORMATS.items():
        cells = [" / ".join(f"{mean(list(part)):.2f}" for part in zip(*found[kind, m])) for m in counts]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    where = rows[0]
    head = (
        f"Speed of one linear layer against bf16 on {where['device']} (torch {where['torch']}, triton "
        f"{where['triton']}), activations in bf16 and quantized on the way where the format does: geometric mean over "
        "12288x3072, 3072x12288 and 3072x15360 with M rows of activations, in a captured CUDA graph / in plain calls, "
        "launches included. Above 1 is faster than bf16."
    )
    head = textwrap.fill(head, 118)
    return f"{head}\n\n" + "\n".join(lines)


def encode_table() -> str:
    found = {row["what"]: row for row in rows_of("encode.csv") if f"{row['N']}x{row['K']}" == WEIGHT}
    lines = ["| codes | quantize, ms | decode, ms |", "|---|---|---|"]
    for kind, label in FORMATS.items():
        cells = [f"{float(found[f'{what} {kind}']['ms']):.3f}" for what in ("quantize", "decode")]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    return (
        f"Quantizing and decoding a {WEIGHT} bf16 weight; copying it takes {float(found['copy']['ms']):.3f} ms.\n\n"
        + "\n".join(lines)
    )


def text() -> str:
    return (
        f"{linear_table()}\n\n{encode_table()}\n\nReproduce: `python3 dev.py bench linear` and `python3 dev.py "
        "bench encode`. On your machine: `fewbits bench`.\n"
    )
