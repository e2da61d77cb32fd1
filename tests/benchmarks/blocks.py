"""A random Flux of real width through ComfyUI's own loader and denoiser, in every format; appends to results/blocks.csv.

    python3 dev.py bench blocks [--formats bnb_nf4,int8_blockwise:block_size=64] [--turns 15]

One denoiser evaluation per picture size, in turns: the format's kernels, the same layers as ComfyUI and comfy-kitchen
run a format without kernels (decode the weight, then multiply with the library), and bf16; the GPU's time, and that of a
plain call, which on a small picture is Python's. Memory is what loading leaves on the
GPU. The emoji model is sampled on the device and on the CPU, where eager PyTorch is the reference. `--device cpu
--hidden 256` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "import_shim"),
    str(Path(__file__).resolve().parents[1]),
]

from support import bench_layers as gpu
import torch
from linear import append

from fewbits.quant_ops.bench import replayed
from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from assets.emoji.comfy_nodes import encode

RESULTS = Path(__file__).parent / "results" / "blocks.csv"
FORMATS = (
    "float8_e4m3fn", "float8_e4m3fn_rowwise", "float8_e4m3fn_blockwise", "int8_tensorwise", "int8_blockwise",
    "int8_blockwise:block_size=64", "int8_lodewise", "bnb_nf4", "bnb_fp4", "float8_e5m2", "float8_e4m3fn_block3d",
    "mxfp8", "nvfp4", "convrot_w4a4", "asym_w4a8_int8",
)  # fmt: skip
HIDDEN, PIXELS = 3072, (256, 1024)
EMOJI, PROMPT, STEPS = Path(__file__).resolve().parents[1] / "assets" / "emoji", "panda", 8
TOKENS = 512  # of the prompt


@cache
def inputs(pixels: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Noise, prompt, its summary, noise level and guidance; on the device before anything is timed: a copy waits."""
    generator = torch.Generator().manual_seed(pixels)
    shapes = (1, 16, pixels // 8, pixels // 8), (1, TOKENS, gpu.TEXT), (1, 768)
    drawn = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return *drawn, torch.full((1,), 0.7, device=device), torch.full((1,), 3.5, device=device)


@dataclass(frozen=True)
class Model:
    """ComfyUI's patcher of one file, on the device."""

    patcher: object
    bytes: int  # that loading it left on the device

    def __call__(self, pixels: int, device: torch.device) -> torch.Tensor:
        """One evaluation of the denoiser on fixed noise, prompt and noise level."""
        noise, prompt, pooled, sigma, guidance = inputs(pixels, device)
        return self.patcher.model.apply_model(
            noise, sigma, c_crossattn=prompt, y=pooled, guidance=guidance
        )

    @contextlib.contextmanager
    def decoding_first(self) -> Iterator[None]:
        """Inside, layers run by ComfyUI's full-precision path and comfy-kitchen's fallback for ops without a handler."""
        from comfy_kitchen.tensor.base import _LAYOUT_DISPATCH_TABLE as handlers

        layers = [
            layer
            for layer in self.patcher.model.modules()
            if getattr(layer, "layout_type", None) is not None
        ]
        full = [layer._full_precision_mm for layer in layers]
        taken = {op: handlers.pop(op) for op in PRODUCTS}
        for layer in layers:
            layer._full_precision_mm, layer._forward = True, torch.nn.functional.linear
        try:
            yield
        finally:
            handlers.update(taken)
            for layer, before in zip(layers, full, strict=True):
                layer._full_precision_mm = before
                del layer._forward  # the class's again


PRODUCTS = torch.ops.aten.linear.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def load(path: Path) -> Model:
    import comfy.model_management
    import comfy.sd

    before = allocated()
    patcher = comfy.sd.load_diffusion_model(str(path))
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return Model(patcher, allocated() - before)


AHEAD_CYCLES = 100_000_000  # the GPU waits .05 s, longer than Python takes to launch one evaluation


def timed(
    contenders: dict[str, tuple[Callable, Callable[[], object]]], turns: int
) -> dict[str, float]:
    """Median milliseconds of calls that take turns; the first two compile kernels.

    Args:
        contenders: prefix of the results -> (what to be inside of, the call).

    Returns:
        `<prefix>ms`: the GPU's work, launched ahead; `<prefix>plain_ms`: a plain call, waited for. A CPU has only these.
    """
    work, plain = ({prefix: [] for prefix in contenders} for _ in range(2))
    gc.collect()
    gc.disable()
    for _ in range(turns + 2):
        for prefix, (inside, call) in contenders.items():
            with inside():
                begin = time.perf_counter()
                call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                plain[prefix].append((time.perf_counter() - begin) * 1e3)
                if torch.cuda.is_available():
                    torch.cuda._sleep(AHEAD_CYCLES)
                    work[prefix].append(replayed(call, 1))
    gc.enable()
    medians = {}
    for prefix in contenders:
        medians[f"{prefix}ms"] = statistics.median(work[prefix][2:] or plain[prefix][2:])
        medians[f"{prefix}plain_ms"] = statistics.median(plain[prefix][2:])
    return medians


def rel_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()).item()


def measure(
    wish: str, source: Path, plain: Model, device: torch.device, args: argparse.Namespace
) -> list[dict]:
    """One row per picture size."""
    path = source.with_name("quantized.safetensors")
    begin = time.perf_counter()
    quantize_file(source, path, Recipe(primary=parse_wish(wish)), device=device, overwrite=True)
    common = {"format": wish, "hidden": args.hidden, "bytes": path.stat().st_size}
    common["quantize_s"] = round(time.perf_counter() - begin, 2)
    model = load(path)
    common["loaded_bytes"] = model.bytes
    rows = []
    for size in args.pixels:
        own, reference = partial(model, size, device), partial(plain, size, device)
        with model.decoding_first():
            decoded = own()
        errors = {
            "rel_l2": rel_l2(own(), reference()),
            "decoded_rel_l2": rel_l2(decoded, reference()),
        }
        plainly = contextlib.nullcontext
        contenders = {
            "": (plainly, own),
            "decoded_": (model.decoding_first, own),
            "bf16_": (plainly, reference),
        }
        rows.append({**common, "pixels": size, **timed(contenders, args.turns), **errors})
    return rows


def sample(model: Model, device: torch.device, prompt: str = PROMPT) -> torch.Tensor:
    """The emoji model's latents of one prompt: Euler steps along a straight path, as Flux models are trained for."""
    context, pooled = encode(prompt)
    x = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(0)).to(device)
    levels = torch.linspace(1, 0, STEPS + 1, device=device)
    for level, following in zip(levels, levels[1:]):
        denoised = model.patcher.model.apply_model(
            x, level.reshape(1), c_crossattn=context.to(device), y=pooled.to(device),
            guidance=torch.full((1,), 3.5, device=device),
        )  # fmt: skip
        x = denoised + (x - denoised) * (following / level)
    return x


def here_and_on_cpu(path: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The same latents from the device and, eagerly, from the CPU."""
    import comfy.model_management

    model, cpu = load(path), torch.device("cpu")
    here = sample(model, device).cpu()
    comfy.model_management.unload_model_and_clones(model.patcher)
    model.patcher.model.to(cpu)
    return here, sample(model, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help="with options: NAME:option=value"
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--pixels", type=int, nargs="+", default=list(PIXELS))
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        gpu.end_without_gpu()
    sys.path.insert(0, os.environ["FEWBITS_COMFYUI"])  # dev.py sets it
    import comfy.cli_args

    comfy.cli_args.args.cpu = device.type == "cpu"
    from fewbits.nodes import bridge

    bridge.register()
    print(
        {seam: reason for seam, reason in bridge.status().items() if reason}
        or "all seams installed",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="fewbits-bench-") as folder, torch.inference_mode():
        source, emoji = Path(folder) / "flux.safetensors", EMOJI / "emoji_flux.safetensors"
        gpu.write_flux(source, (1, 2), args.hidden, device)
        plain, emoji_plain = load(source), here_and_on_cpu(emoji, device)
        print(
            f"emoji model in bf16, latents of the device to the CPU's: rel_l2 {rel_l2(*emoji_plain):.4f}",
            flush=True,
        )
        for wish in args.formats.split(","):
            path = Path(folder) / "emoji_quantized.safetensors"
            quantize_file(
                emoji, path, Recipe(primary=parse_wish(wish)), device="cpu", overwrite=True
            )
            here, on_cpu = here_and_on_cpu(path, device)
            checked = {
                "emoji_to_cpu": rel_l2(here, on_cpu),
                "emoji_bf16_to_cpu": rel_l2(*emoji_plain),
                "emoji_rel_l2": rel_l2(on_cpu, emoji_plain[1]),
            }
            rows = [row | checked for row in measure(wish, source, plain, device, args)]
            for row in rows:
                print(f"{wish:<32}{row['pixels']:>5}: {row['ms']:8.2f} ms, bf16 {row['bf16_ms'] / row['ms']:.2f}x, decoded "
                      f"{row['decoded_ms'] / row['ms']:.2f}x; plain {row['bf16_plain_ms'] / row['plain_ms']:.2f}x, "
                      f"{row['decoded_plain_ms'] / row['plain_ms']:.2f}x; rel_l2 {row['rel_l2']:.4f} (decoded "
                      f"{row['decoded_rel_l2']:.4f}); loaded {row['loaded_bytes'] / row['bytes']:.4f} of the file; emoji "
                      f"to CPU {row['emoji_to_cpu']:.4f}, quantized {row['emoji_rel_l2']:.4f}", flush=True)  # fmt: skip
            if device.type == "cuda":
                append(RESULTS, rows)


if __name__ == "__main__":
    main()
