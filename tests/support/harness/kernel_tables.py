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
CASE = ("kind", "what", "peer", "N", "K", "M", "format", "pixels")


def rows_of(name: str) -> list[dict]:
    """The rows of a CSV; of several runs of a case the last."""
    with open(RESULTS / name, newline="", encoding="utf-8") as file:
        rows = {tuple(row.get(key) for key in CASE): row for row in csv.DictReader(file)}
    return list(rows.values())


def label(peer: str) -> str:
    """`matmul_4bit, bitsandbytes 0.50.2` -> "bitsandbytes 0.50.2 `matmul_4bit`"; `F alone, ...` keeps its `alone`."""
    call, _, library = peer.rpartition(", ")
    name, *rest = call.split(" ", 1)
    return " ".join([library, f"`{name}`", *rest])


def mean(values: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def linear_table() -> str:
    rows = [row for row in rows_of("linear.csv") if (int(row["N"]), int(row["K"])) in FLUX]
    counts = sorted({int(row["M"]) for row in rows})
    found: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        speeds = (
            float(row["bf16_ms"]) / float(row["ms"]),
            float(row["bf16_plain_ms"]) / float(row["plain_ms"]),
        )
        found[row["kind"], int(row["M"])].append(speeds)
    lines = [
        "| format | " + " | ".join(f"M = {m}" for m in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for kind, name in FORMATS.items():
        cells = [
            " / ".join(f"{mean(list(part)):.2f}" for part in zip(*found[kind, m])) for m in counts
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    where = rows[0]
    head = (
        f"Speed of one linear layer against bf16 on {where['device']} (torch {where['torch']}, triton "
        f"{where['triton']}), activations in bf16 and quantized on the way where the format does: geometric mean over "
        "12288x3072, 3072x12288 and 3072x15360 with M rows of activations, in a captured CUDA graph / in plain calls, "
        "launches included. Above 1 is faster than bf16."
    )
    head = textwrap.fill(head, 118)
    return f"{head}\n\n" + "\n".join(lines)


def peers_table() -> str:
    """Ours against what users run otherwise, in the order of `FORMATS`."""
    found: dict[tuple, dict[int, list[tuple]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of("peers.csv"):
        if (int(row["N"]), int(row["K"])) in FLUX:
            captured = float(row["ms"]) / float(row["ours_ms"]) if row["ms"] else None
            plain = float(row["plain_ms"]) / float(row["ours_plain_ms"])
            found[row["kind"], row["peer"]][int(row["M"])].append((captured, plain))
    counts = sorted({m for ratios in found.values() for m in ratios})
    lines = [
        "| ours | against | " + " | ".join(f"M = {m}" for m in counts) + " |",
        "|---|---|" + "---|" * len(counts),
    ]
    for kind, peer in sorted(found, key=lambda key: list(FORMATS).index(key[0])):
        cells = []
        for m in counts:
            parts = zip(*found[kind, peer][m])
            cells.append(
                " / ".join("-" if None in part else f"{mean(list(part)):.2f}" for part in parts)
                or "-"
            )
        lines.append(f"| {FORMATS[kind]} | {label(peer)} | " + " | ".join(cells) + " |")
    head = (
        "The same layers run by other libraries, measured in the same process right after ours: their time over ours, "
        "in a captured graph / in plain calls, geometric mean over the same shapes. Above 1 ours is faster. `alone`: the "
        "product without quantizing the activations, which ours includes. `-`: the library refuses the shape or the graph."
    )
    return f"{textwrap.fill(head, 118)}\n\n" + "\n".join(lines)


def encode_table() -> str:
    found = {
        row["what"]: row for row in rows_of("encode.csv") if f"{row['N']}x{row['K']}" == WEIGHT
    }
    others = {tuple(what.split(" by ")): row for what, row in found.items() if " by " in what}
    lines = ["| codes | quantize, ms | decode, ms |", "|---|---|---|"]
    for kind, name in FORMATS.items():
        cells = [f"{float(found[f'{what} {kind}']['ms']):.3f}" for what in ("quantize", "decode")]
        for i, what in enumerate(("quantize", "decode")):
            peers = {
                peer.rpartition(", ")[2]: row
                for (done, peer), row in others.items()
                if done == f"{what} {kind}"
            }
            cells[i] += "".join(
                f" ({library}: {float(row['ms']):.3f})" for library, row in peers.items()
            )
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return (
        f"Quantizing and decoding a {WEIGHT} bf16 weight; copying it takes {float(found['copy']['ms']):.3f} ms.\n\n"
        + "\n".join(lines)
    )


PEERS = ("bf16_", "decoded_")


def named(wish: str) -> str:
    """`int8_blockwise:block_size=64` -> "`int8_blockwise`, block size 64"; a rotation or a method by its name alone."""
    name, _, options = wish.partition(":")
    words = (
        options.replace("convrot=true", "ConvRot")
        .replace("method=", "")
        .replace("=", " ")
        .replace("_", " ")
    )
    return f"`{name}`" + (f", {words}" if words else "")


def whole_model_table() -> str:
    """Plain calls and the GPU alone, by picture size."""
    rows = rows_of("whole_model.csv")
    sizes = sorted({int(row["pixels"]) for row in rows})
    found = {(row["format"], int(row["pixels"])): row for row in rows}
    header = ["format", "blocks"]
    header += [f"{size}x{size}{kind}" for size in sizes for kind in ("", ", GPU alone")]
    header += ["rel_l2"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---|" * (len(header) - 1)]
    for wish in dict.fromkeys(row["format"] for row in rows):
        last = found[wish, sizes[-1]]
        faster = [
            f"{float(found[wish, size]['bf16_' + kind]) / float(found[wish, size][kind]):.2f}"
            for size in sizes
            for kind in ("plain_ms", "ms")
        ]
        blocks = f"{last['double']} + {last['single']}"
        cells = [named(wish), blocks, *faster, f"{float(last['rel_l2']):.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    head = (
        "One denoiser evaluation of a random Flux.1 through ComfyUI 0.30's own loader, on one H200: speed against bf16 "
        "in the same process, above 1 is faster. 19 + 38 blocks are the whole model, 23.8 GB in bf16. Plain calls are "
        "what users run; on small pictures Python sets their pace, for bf16 too. `GPU alone`: the GPU's work, launched "
        f"ahead. `rel_l2`: of the result against bf16 at {sizes[-1]}x{sizes[-1]}."
    )
    return f"{textwrap.fill(head, 118)}\n\n" + "\n".join(lines)


def compiled_table() -> str:
    """Plain calls of compiled models and the GPU alone, by picture size."""
    rows = rows_of("compiled.csv")
    plain = {row["pixels"]: row for row in rows if row["format"] == "bf16"}
    header = ["format", *(f"{size}x{size}" for size in plain), "graphs"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---|" * (len(header) - 1)]
    found = {(row["format"], row["pixels"]): row for row in rows}
    for wish in dict.fromkeys(row["format"] for row in rows):
        cells = []
        for size, bf16 in plain.items():
            row = found[wish, size]
            faster = (f"{float(bf16[kind]) / float(row[kind]):.2f}" for kind in ("plain_ms", "ms"))
            cells.append(" / ".join(faster))
        lines.append(f"| {named(wish)} | {' | '.join(cells)} | {row['graphs']} |")
    blocks = f"{rows[0]['double']} double and {rows[0]['single']} single blocks"
    head = (
        f"The same under torch.compile, {blocks}, sizes in that order in one process: plain calls / GPU alone, against "
        "compiled bf16. A compiler makes a graph for the first size and two for the others, of bf16 too."
    )
    return f"{textwrap.fill(head, 118)}\n\n" + "\n".join(lines)


def emoji_table() -> str:
    lines = [
        "| format | as users run it | as layers of real width | weights decoded first | comfy-kitchen |"
    ]
    lines += ["|---|---|---|---|---|"]
    for row in rows_of("emoji_gpu.csv"):
        cells = [f"{float(row[key]):.4f}" for key in ("ours", "large", "decoded")]
        kitchen = f"{float(row['kitchen']):.4f}" if float(row["kitchen"]) else "-"
        lines.append(f"| {named(row['format'])} | {' | '.join(cells)} | {kitchen} |")
    head = (
        "What the products cost in pictures: rel_l2 of the emoji model's final latents on the GPU against bf16, mean of "
        "eight prompts. Its layers are small, so most are decoded as users run it; `as layers of real width` forces what "
        "a large model takes. `weights decoded first`: activations stay in bf16. comfy-kitchen: its own product of the "
        "same file."
    )
    return f"{textwrap.fill(head, 118)}\n\n" + "\n".join(lines)


def blocks_table() -> str:
    whole = {row["format"] for row in rows_of("whole_model.csv")}
    rows = [row for row in rows_of("blocks.csv") if row["format"] not in whole]
    sizes = sorted({int(row["pixels"]) for row in rows})
    found = {(row["format"], int(row["pixels"])): row for row in rows}
    kinds = {"ms": ", GPU alone", "plain_ms": ""}
    header = [
        "format",
        *(f"{size}x{size}{name}" for name in kinds.values() for size in sizes),
    ]
    header += ["latents", "decoded"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---|" * (len(header) - 1)]
    for wish in dict.fromkeys(row["format"] for row in rows):
        last = found[wish, sizes[-1]]
        cells = [
            " / ".join(
                f"{float(found[wish, size][peer + kind]) / float(found[wish, size][kind]):.2f}"
                for peer in PEERS
            )
            for kind in kinds
            for size in sizes
        ]
        errors = [f"{float(last[key]):.4f}" for key in ("rel_l2", "decoded_rel_l2")]
        lines.append(f"| {' | '.join([named(wish), *cells, *errors])} |")
    head = (
        "The other formats, on one double and two single blocks, measured before calls took less Python: speed against "
        "bf16 / against decoding every weight first. `latents`: rel_l2 of the result against bf16, and that of decoded "
        f"weights, at {sizes[-1]}x{sizes[-1]}."
    )
    return f"{textwrap.fill(head, 118)}\n\n" + "\n".join(lines)


def conversion_table() -> str:
    rows = rows_of("conversion_gpu.csv")
    lines = ["| format | seconds | writing the output alone | GPU memory |", "|---|---|---|---|"]
    for row in rows:
        seconds, alone = (f"{float(row[key]):.2f}" for key in ("seconds", "write_s"))
        lines.append(
            f"| {named(row['format'])} | {seconds} | {alone} | {int(row['gpu_peak_bytes']) / 1e9:.2f} GB |"
        )
    head = (
        f"Converting a bf16 file of {int(rows[0]['bytes']) / 1e9:.1f} GB on the GPU, from the page cache to the disk, "
        "against writing the output with nothing to compute, in seconds. `bnb_fp4` chooses its scales by `mse_clip` "
        "unless told otherwise."
    )
    return f"{textwrap.fill(head, 118)}\n\n" + "\n".join(lines)


def text() -> str:
    """All tables; of peers only where they were measured."""
    tables = [linear_table()]
    if (RESULTS / "peers.csv").exists():
        tables.append(peers_table())
    tables += [whole_model_table(), compiled_table(), emoji_table(), blocks_table()]
    tables += [encode_table(), conversion_table()]
    scripts = ", ".join(
        f"`python3 dev.py bench {name}`"
        for name in ("linear", "encode", "whole_model", "emoji_gpu", "blocks", "conversion_gpu")
    )
    return "\n\n".join(tables) + f"\n\nReproduce: {scripts}.\nOn your machine: `fewbits bench`.\n"
