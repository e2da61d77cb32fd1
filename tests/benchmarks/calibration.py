"""What a calibration is worth: output error of gptq (or --method) x nearest's, on prompts that it never saw; and pictures.

    python tests/benchmarks/calibration.py [--formats bnb_nf4,...] [--method adaround] [--device cuda] [--pictures | --encoder FOLDER]

The emoji model; statistics from 32 prompts in two halves, errors on the activations of 32 others, 16 steps, cfg 3. Means
over the layers, weighted by their parameters. Appends a row per format to results/calibration.csv. `--pictures` draws all
64 prompts instead, with decoded weights, and appends the distance of the final latents and the SSIM of the pictures, each
with its standard error, to results/calibrated_pictures.csv. `--encoder FOLDER` measures the first table on a text encoder
instead, a BERT or an MPNet as transformers stores it: the sentences of Python's own help pages, 512 seen and 512 others;
`--every 4` rounds every fourth block. Asserts nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "import_shim"), str(HERE.parent)]

import piq
import torch

from fewbits.quant_ops.calibration import Calibration, Observer
from fewbits.quant_ops.formats import Format, FormatOptions, get_format
from fewbits.quant_ops.methods import Layer, choose, get_method, layer_generator
from fewbits.quant_ops.planning.recipe import Wish, parse_wish
from fewbits.quant_ops.spec import LayerInput
from support.layers import EMOJI, emoji_trainer, emoji_weights
from support.results import append

RESULTS = HERE / "results"
STEPS, CFG, BATCH = 16, 3.0, 16
SENTENCES = 512
FORMATS = (
    "float8_e4m3fn,int8_tensorwise:convrot=false,int8_tensorwise:convrot=true,int8_blockwise,bnb_nf4,nvfp4,"
    "asym_w4a8_int8"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--method", default="gptq", choices=("gptq", "adaround"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--encoder", metavar="FOLDER")
    parser.add_argument("--every", type=int, default=1, help="of the encoder's blocks")
    args = parser.parse_args()
    table, seen = (
        of_an_encoder(args.encoder, args.every) if args.encoder else of_the_emoji_model(args)
    )
    for text in args.formats.split(","):
        started = time.perf_counter()
        wish = parse_wish(text)
        row = {
            "of": Path(args.encoder).name if args.encoder else "emoji",
            "format": text,
            "method": args.method,
        }
        row |= table.row(wish, seen, torch.device(args.device), args.method)
        row |= {"seconds": f"{time.perf_counter() - started:.0f}", "device": args.device}
        print(row, flush=True)
        append(table.file, [row])


def of_the_emoji_model(args: argparse.Namespace) -> tuple[HeldOut | Pictures, Calibration]:
    train, model, prompts = emoji_trainer(args.device)
    prompts = [prompt for prompt in prompts if prompt]
    table = Pictures(train, model, prompts, args.device) if args.pictures else None
    seen = watched(train, model, prompts[:32], args.device)
    return table or HeldOut(watched(train, model, prompts[32:], args.device), emoji_weights), seen


def of_an_encoder(folder: str, every: int) -> tuple[HeldOut, Calibration]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    weights = {
        name: module.weight.detach().bfloat16()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("encoder.layer.")
        if int(name.split(".")[2]) % every == 0
    }
    sentences = english()

    def read(part: list[str]) -> Calibration:
        observer = Observer(10**9)
        observer.start_run()
        for start in range(0, len(part), BATCH):
            observer.start_run()
            tokens = tokenizer(part[start : start + BATCH], padding=True, return_tensors="pt")
            with observer.watching(model.eval()), torch.no_grad():
                model(**tokens)
        return observer.finish()

    seen, held = read(sentences[:SENTENCES]), read(sentences[SENTENCES : 2 * SENTENCES])
    return HeldOut(held, lambda wish: weights), seen


def english() -> list[str]:
    """Sentences of Python's help pages, shuffled; 1,770 of them in Python 3.11."""
    from pydoc_data.topics import topics

    text = " ".join(re.sub(r"\s+", " ", topic) for topic in topics.values())
    parts = re.split(r"(?<=[.:])\s+(?=[A-Z])", text)
    sentences = [part for part in dict.fromkeys(parts) if 40 < len(part) < 300]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    return [sentences[index] for index in order]


def watched(train, model: torch.nn.Module, prompts: list[str], device: str) -> Calibration:
    observer = Observer(10**9)
    observer.start_run()  # the first is dealt out call by call, and here runs are to be halves
    for start in range(0, len(prompts), BATCH):
        observer.start_run()
        conditioning = train.conditioning(prompts[start : start + BATCH], device)
        with observer.watching(model):
            train.sample(model, *conditioning, STEPS, CFG, 1 + start, device)
    return observer.finish()


class HeldOut:
    file = RESULTS / "calibration.csv"

    def __init__(self, held: Calibration, weights: Callable[[Wish], dict[str, torch.Tensor]]):
        self.held, self.weights = held, weights

    def row(
        self, wish: Wish, seen: Calibration, device: torch.device, method: str
    ) -> dict[str, str]:
        total, parameters, worst = 0.0, 0, 0.0
        for name, weight in self.weights(wish).items():
            weight = weight.to(device)
            gram = self.held.inputs_of(name, tuple(weight.shape), device).gram
            calibrated, nearest = (
                float(((error @ gram) * error).sum())
                for error in (
                    decoded(name, weight, wish, seen, each) - weight.float()
                    for each in (method, "nearest")
                )
            )
            ratio = (calibrated / nearest) ** 0.5
            total, worst = total + ratio * weight.numel(), max(worst, ratio)
            parameters += weight.numel()
        return {"held_out": f"{total / parameters:.3f}", "worst_layer": f"{worst:.3f}"}


class Pictures:
    file = RESULTS / "calibrated_pictures.csv"

    def __init__(self, train, model: torch.nn.Module, prompts: list[str], device: str):
        self.train, self.model, self.prompts, self.device = train, model, prompts, device
        _, self.decoder = train.load_vae(
            argparse.Namespace(out=EMOJI.parent, work=EMOJI.parent), device
        )
        self.latents, self.pictures = self.draw()

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        latents = torch.cat(
            [
                self.train.sample(
                    self.model,
                    *self.train.conditioning(self.prompts[start : start + BATCH], self.device),
                    STEPS,
                    CFG,
                    100 + start,
                    self.device,
                )
                for start in range(0, len(self.prompts), BATCH)
            ]
        )
        return latents, self.train.decode_all(self.decoder, latents)

    def row(
        self, wish: Wish, seen: Calibration, device: torch.device, method: str
    ) -> dict[str, str]:
        plain, likeness = self.measured(wish, seen, "nearest")
        distance, calibrated_likeness = self.measured(wish, seen, method)
        return {
            "ratio": with_error(distance / plain.mean()),
            "nearest latent": with_error(plain),
            "nearest ssim": with_error(likeness),
            "calibrated latent": with_error(distance),
            "calibrated ssim": with_error(calibrated_likeness),
        }

    def measured(
        self, wish: Wish, seen: Calibration, method: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each prompt: the final latent's distance over its norm, and the SSIM of the picture."""
        original = {}
        for name, weight in emoji_weights(wish).items():
            module = self.model.get_submodule(name)
            original[name] = module.weight.data
            module.weight.data = decoded(name, weight.to(self.device), wish, seen, method)
        latents, pictures = self.draw()
        for name, weight in original.items():
            self.model.get_submodule(name).weight.data = weight
        distance = (latents - self.latents).flatten(1).norm(dim=1) / self.latents.flatten(1).norm(
            dim=1
        )
        return distance, piq.ssim(pictures, self.pictures, data_range=1.0, reduction="none")


def with_error(values: torch.Tensor) -> str:
    return f"{float(values.mean()):.4f}+-{float(values.std() / len(values) ** 0.5):.4f}"


def decoded(
    name: str, weight: torch.Tensor, wish: Wish, seen: Calibration, method: str
) -> torch.Tensor:
    """(N, K) float32: what is stored of a weight, read again."""
    layer = LayerInput(tuple(weight.shape), "BF16")
    (format, options), chosen = fitting(wish, layer), get_method(method)
    grid, prepared = format.grid(layer, options), format.prepare(weight, options)
    inputs = seen.inputs_of(name, tuple(weight.shape), weight.device)
    inputs = inputs.map(lambda rows: format.prepare(rows, options))
    generator = layer_generator(0, name, weight.device)
    choice = choose(chosen, Layer(prepared, grid, chosen.configure({}), generator, inputs=inputs))
    return format.dequantize(format.pack(choice.codes, choice.scale, options), layer, options)


def fitting(wish: Wish, layer: LayerInput) -> tuple[Format, FormatOptions]:
    """What a plan takes for this layer: a smaller group where the one wished for divides no row."""
    format = get_format(wish.format)
    if format.check(layer, wish.options) is None:
        return format, wish.options
    name, stated = format.fallback(layer, wish.options)
    return get_format(name), get_format(name).configure(stated)


if __name__ == "__main__":
    main()
