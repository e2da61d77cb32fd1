"""The demo: quantize the emoji model, sample every file through ComfyUI's stock loader, compare the pictures.

python dev.py demo        writes demo_output/{compare.png, summary.json, *.safetensors}
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.harness import EMOJI, EMOJI_NODES, PACK, PROMPTS, ComfyServer, emoji_models
from support.harness.emoji import ORIGINAL
from support.harness.quality import compare, sample

STARTED = time.monotonic()
FORMATS = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}


def main() -> None:
    output = Path(sys.argv[1])
    output.mkdir(exist_ok=True)
    rows = [
        {
            "format": "bfloat16 (original)",
            "file": EMOJI / ORIGINAL,
            "min_comfyui": None,
            "label": "original",
        }
    ]
    for label, name in FORMATS.items():
        rows.append(
            {
                "format": name,
                "label": label,
                **quantize(name, output / f"emoji_{label}.safetensors"),
            }
        )
    with tempfile.TemporaryDirectory(prefix="fewbits-demo-") as folder:
        say("start ComfyUI")
        models = emoji_models(*(row["file"] for row in rows[1:]))
        nodes = [PACK, EMOJI_NODES]
        with ComfyServer(Path(folder), custom_nodes=nodes, models=models, threads=0) as server:
            say(
                f"ComfyUI {server.stats['system']['comfyui_version']}: {len(PROMPTS)} prompts x {len(rows)} models"
            )
            for row in rows:
                row["samples"] = sample(server, row["file"].name)
    for row in rows:
        quality = compare(row["samples"], rows[0]["samples"])
        row["bytes"] = row["file"].stat().st_size
        row["ssim"] = round(quality.ssim, 5)
        row["psnr"] = None if quality.psnr is None else round(quality.psnr, 2)
    keys = ("format", "bytes", "min_comfyui", "ssim", "psnr")
    (output / "summary.json").write_text(
        json.dumps([{key: row[key] for key in keys} for row in rows], indent=2) + "\n"
    )
    draw(output / "compare.png", rows)
    print_table(rows)
    print(f"pictures: {output / 'compare.png'}")


def say(text: str) -> None:
    print(f"== {time.monotonic() - STARTED:3.0f} s  {text}", flush=True)


def quantize(name: str, path: Path) -> dict:
    """Run `fewbits quantize` as a user would."""
    command = [
        sys.executable,
        "-m",
        "fewbits.quant_ops.cli",
        "quantize",
        str(EMOJI / ORIGINAL),
        "-o",
        str(path),
    ]
    command += ["--format", name, "--overwrite", "--json"]
    say(f"fewbits quantize {ORIGINAL} -o {path.name} --format {name}")
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise SystemExit(f"fewbits quantize --format {name} failed with status {result.returncode}")
    return {"file": path, "min_comfyui": json.loads(result.stdout)["min_comfyui"]}


def print_table(rows: list[dict]) -> None:
    print(f"\n{'format':<20} {'file size':>12} {'min ComfyUI':>12} {'SSIM':>8} {'PSNR':>8}")
    for row in rows:
        decibels = "-" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        size = f"{row['bytes'] / 1e6:.2f} MB"
        version = row["min_comfyui"] or "-"
        print(f"{row['format']:<20} {size:>12} {version:>12} {row['ssim']:>8.4f} {decibels:>8}")


def draw(path: Path, rows: list[dict]) -> None:
    """Rows original / fp8 / int8, one column per prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(rows), len(PROMPTS), figsize=(1.5 * len(PROMPTS) + 1.6, 1.72 * len(rows) + 0.35)
    )
    for row, axes in zip(rows, grid, strict=True):
        for axis, (prompt, found) in zip(axes, row["samples"].items(), strict=True):
            axis.imshow(found.image)
            axis.set_xticks([])
            axis.set_yticks([])
            if row is rows[0]:
                axis.set_title(prompt.replace(" with ", "\nwith "), fontsize=8)
        quality = "" if row["psnr"] is None else f"\nSSIM {row['ssim']:.3f}\n{row['psnr']:.1f} dB"
        label = f"{row['label']}\n{row['bytes'] / 1e6:.1f} MB{quality}"
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    figure.tight_layout(pad=0.5)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # a prompt that ComfyUI could not run, by its message
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
