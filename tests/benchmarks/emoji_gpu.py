"""The emoji model's final latents on a GPU, against bf16: by our products, with 16-bit activations, by comfy-kitchen.

    python3 dev.py bench emoji_gpu [--formats bnb_nf4,int8_tensorwise:convrot=true] [--prompts 4]

rel_l2 of final latents, mean over prompts. `ours`: as users run it. `decoded`: the same codes decoded first, activations
as they are: the format's weight-only error. `large`: by the path that layers of real width take on Hopper. `kitchen`: ComfyUI's own product of the same file, where it has one. Appends
to results/emoji_gpu.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

import torch
from blocks import EMOJI, Model, load, rel_l2, sample
from linear import append
from support import bench_layers as gpu
from whole_model import CUDA, FORMATS

from fewbits.kernels.dispatch import use_backend
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.layouts import native
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish

RESULTS = Path(__file__).parent / "results" / "emoji_gpu.csv"
ROWS = "float8_e4m3fn", "float8_e4m3fn_rowwise", "int8_tensorwise"
PROMPTS = "panda", "rocket", "tomato", "ghost", "cat", "sun", "whale", "rose"


@contextlib.contextmanager
def kitchens_products():
    """Inside, ComfyUI's own formats are multiplied by comfy-kitchen; layers loaded inside, too."""
    os.environ[native.OFF] = "0"
    try:
        yield
    finally:
        del os.environ[native.OFF]


def measure(wish: str, path: Path, wanted: dict[str, torch.Tensor]) -> dict:
    def error(model: Model) -> float:
        return statistics.mean(rel_l2(sample(model, CUDA, p), wanted[p]) for p in wanted)

    model = load(path)
    row = {"format": wish, "prompts": len(wanted), "ours": error(model)}
    with model.decoding_first():
        row["decoded"] = error(model)
    name = parse_wish(wish).format
    with use_backend("hopper" if name in ROWS else "scratch"):
        row["large"] = error(model)
    row["kitchen"] = 0.0
    if get_format(name).native:
        with kitchens_products():
            row["kitchen"] = error(load(path))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="NAME:option=value")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    args = parser.parse_args()
    gpu.end_without_gpu()
    sys.path.insert(0, os.environ["FEWBITS_COMFYUI"])  # dev.py sets it
    from fewbits.nodes import bridge

    import comfy.sd  # noqa: F401  ComfyUI is there before any pack

    bridge.register()
    source = EMOJI / "emoji_flux.safetensors"
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as folder, torch.inference_mode():
        plain = load(source)
        wanted = {prompt: sample(plain, CUDA, prompt) for prompt in PROMPTS[: args.prompts]}
        for wish in args.formats.split(","):
            path = Path(folder) / f"{wish.replace(':', '_')}.safetensors"
            quantize_file(source, path, Recipe(primary=parse_wish(wish)), device="cpu")
            row = measure(wish, path, wanted)
            append(RESULTS, [row])
            print(
                f"{wish:<32} ours {row['ours']:.4f}, as large layers {row['large']:.4f}, decoded "
                f"{row['decoded']:.4f}, comfy-kitchen {row['kitchen']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
