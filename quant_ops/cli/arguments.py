"""What can be typed: the arguments of every command, with their help.

Imports nothing that takes time, so that `fewbits COMMAND --help` does not wait for torch. What help
names stands in tables here; tests/cli/test_door.py compares them with those that they are taken
from.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..errors import RecipeError

FORMATS = (
    "asym_w4a8_int8",
    "bnb_nf4",
    "bnb_fp4",
    "convrot_w4a4",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fn_rowwise",
    "float8_e4m3fn_blockwise",
    "float8_e4m3fn_block3d",
    "int8_tensorwise",
    "int8_blockwise",
    "int8_lodewise",
    "mxfp8",
    "nvfp4",
)
SHORT_NAMES = ("nf4", "fp4", "fp8", "int8")
METHODS = ("adaround", "mse_clip", "svd", "gptq", "nearest")
OWN_METHODS = "mse_clip for bnb_fp4, else nearest"
TARGETS = ("comfy_quant", "bnb", "bf16")
ROWS = (1, 16, 256, 4096)
SHAPE = (12288, 3072)
CPU_ROWS = (1, 16, 256)
CPU_SHAPE = (1024, 1024)
CLASSES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SOURCE = ".safetensors file, .safetensors.index.json, or folder of shards"


def quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, nargs="?", help=SOURCE)
    _add_output(parser)
    add_recipe_arguments(parser)
    _add_fit(parser)
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="C.safetensors",
        help="what the layers are given while the model runs, for gptq and adaround",
    )
    parser.add_argument(
        "--input-scales",
        action="store_true",
        help="store the scales of inputs, from --calibration, where the format takes one",
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda when there is one), cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--verify", action="store_true", help="decode what was written by a second decoder too"
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="layers that are quantized in another format are decoded and rounded again",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and convert nothing")
    parser.add_argument(
        "--no-report", action="store_true", help="write no OUT.fewbits.json beside the file"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(check=_needs_a_wish)


def calibrate(parser: argparse.ArgumentParser) -> None:
    """It has none: see the text."""


def convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help=SOURCE)
    _add_output(parser)
    parser.add_argument(
        "--to", choices=TARGETS, default="comfy_quant",
        help="comfy_quant (ComfyUI's and ours), bnb (bitsandbytes' keys), bf16 (decoded)",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="only", choices=["fp8_scaled"], help="refuse any other dialect"
    )
    parser.add_argument(
        "--hp-filter",
        metavar="REGEX",
        help="every layer whose name matches must be high precision, else nothing is written",
    )
    parser.add_argument(
        "--full-precision-mm",
        action="store_true",
        help="mark FP8 layers for full-precision products",
    )
    add_import_arguments(parser)
    parser.add_argument(
        "--verify", action="store_true", help="decode what was written by a second decoder too"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, nargs="?", help=SOURCE)
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--advise",
        action="store_true",
        help="which format suits this model, GPU and ComfyUI, the best first; needs no --format",
    )
    parser.add_argument(
        "--bench",
        type=Path,
        metavar="B.json",
        help="speeds for --advise: what `fewbits bench --json` printed on that GPU",
    )
    parser.add_argument(
        "--template",
        action="store_true",
        help="write a layer-config to fill in beside the model; needs no --format",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing template")
    parser.set_defaults(check=_needs_a_wish)


def inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")


def verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help=SOURCE)
    parser.add_argument(
        "--against", type=Path, metavar="ORIGINAL", help="also the error of each layer, worst first"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help=f"{SOURCE}; errors are relative to it")
    parser.add_argument("second", type=Path)
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="FOLDER",
        help="also draw error_by_depth.png, worst_layers.png and histograms.png there; needs "
        "matplotlib",
    )
    parser.add_argument(
        "--theme", choices=("dark", "light"), default="light", help="background of the pictures"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help=SOURCE)
    _add_output(parser)
    add_import_arguments(parser)
    parser.add_argument(
        "--verify", action="store_true", help="decode what was written by a second decoder too"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", dest="formats", action="append", metavar="F", help="only this one; repeatable"
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        help=f"rows of the input (default {_usual(ROWS, CPU_ROWS, ' ')})",
    )
    size = _usual(SHAPE, CPU_SHAPE, "x")
    parser.add_argument("--size", metavar="NxK", help=f"the layer's weight (default {size})")
    parser.add_argument(
        "--reasons", action="store_true", help="only say which kernel runs; time nothing"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (cuda when there is one), cpu, cuda, cuda:1"
    )
    parser.add_argument(
        "--gpu",
        choices=CLASSES,
        metavar="SM",
        help=f"only say what runs on this class of GPU, here or not: {', '.join(CLASSES)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _usual(numbers: tuple[int, ...], on_a_cpu: tuple[int, ...], between: str) -> str:
    said, cpu = between.join(map(str, numbers)), between.join(map(str, on_a_cpu))
    return f"{said}; on a CPU {cpu}"


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """What a file may leave unsaid."""
    parser.add_argument(
        "--assume",
        metavar="F",
        help="what 4-bit layers are that do not say it: nf4, fp4, or a format with block scales",
    )
    parser.add_argument(
        "--assume-convrot",
        type=int,
        metavar="G",
        help="INT8 layers without JSON are rotated in groups of G",
    )
    parser.add_argument(
        "--nibble-order", choices=["low", "high"], help="for 4-bit layers where no rule decides"
    )
    parser.add_argument(
        "--shapes-from",
        type=Path,
        metavar="ORIGINAL",
        help="file that says the shapes of flat weights",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        metavar="F",
        help=f"what layers become: {', '.join(FORMATS)}; for short {', '.join(SHORT_NAMES)}; auto: "
        "what suits the model and the GPU best",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help='for --format auto and plan --advise: a GPU that is not here, such as "RTX 3060 12GB"',
    )
    parser.add_argument(
        "--comfyui",
        metavar="VERSION",
        help="for the same: the ComfyUI that shall open the file (default: the newest)",
    )
    parser.add_argument(
        "--scaling", help="how many weights share a scale: tensor, row (default: the format's own)"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="R.toml", help="a recipe file; --format only if it says none"
    )
    parser.add_argument(
        "--rule",
        dest="rules",
        action="append",
        default=[],
        type=_tagged("--rule"),
        metavar="PATTERN=FORMAT[:o=v,...]",
        help="another format for layers whose name matches (glob, re: or search:); first match "
        "decides; repeatable",
    )
    parser.add_argument(
        "--keep",
        dest="rules",
        action="append",
        type=_tagged("--keep"),
        metavar="PATTERN",
        help="keep matching layers as they are; repeatable, in one order with --rule",
    )
    parser.add_argument(
        "--fallback",
        metavar="F",
        help="format for what a preset would keep",
    )
    parser.add_argument(
        "--heur",
        dest="heuristics",
        action="store_true",
        help="layers that gain nothing by their shape count as excluded",
    )
    parser.add_argument(
        "--layer-config", type=Path, metavar="C.json", help="settings per layer, before every rule"
    )
    parser.add_argument(
        "--fullmatch", action="store_true", help="layer-config keys are whole regular expressions"
    )
    parser.add_argument(
        "--method", help=f"how codes are chosen: {', '.join(METHODS)} (default: {OWN_METHODS})"
    )
    parser.add_argument("--preset", help="auto (default), none, or presets joined by +")
    parser.add_argument(
        "--seed", type=int, help="seed of methods that draw random numbers (default 0)"
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    """What the result shall be, in place of a format."""
    group = parser.add_argument_group("fit to a size or an error, in place of --format")
    goal = group.add_mutually_exclusive_group()
    goal.add_argument("--target-size", metavar="SIZE", help="of the file, at most: 6GB, or 40%%")
    goal.add_argument(
        "--target-vram",
        metavar="SIZE",
        help="memory of the GPU: 12GB; a fifth is left for activations",
    )
    goal.add_argument(
        "--max-error",
        metavar="E",
        help="of weights, or of outputs with --calibration, as 0.02; the smallest file within it",
    )
    group.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="F[:o=v,...]",
        help="a format to choose among, repeatable (default: those of docs/fit.md)",
    )
    group.add_argument(
        "--save-recipe", type=Path, metavar="R.toml", help="write down which layer became what"
    )


def _fits(args: argparse.Namespace) -> bool:
    """Whether a size or an error is asked for, which then decides about formats."""
    return any(getattr(args, name, None) for name in ("target_size", "target_vram", "max_error"))


def _tagged(flag: str) -> Callable[[str], tuple[str, str]]:
    """Values of several flags in one list, in the order in which they were typed."""

    def tag(text: str) -> tuple[str, str]:
        return flag, text

    return tag


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT.safetensors",
        help="default: beside the input, its name with what it becomes",
    )


def _needs_a_wish(args: argparse.Namespace) -> None:
    """Everything that is missing, at once."""
    missing = ["the input"] if args.input is None else []
    stated = args.format or args.recipe or _fits(args)
    if not (stated or getattr(args, "template", False) or getattr(args, "advise", False)):
        missing.append("--format F, or --recipe R.toml with a [primary] table")
    if missing:
        raise RecipeError(f"missing: {'; and '.join(missing)}; see fewbits {args.command} --help")


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "quantize": quantize,
    "calibrate": calibrate,
    "convert": convert,
    "plan": plan,
    "inspect": inspect,
    "verify": verify,
    "compare": compare,
    "repair": repair,
    "bench": bench,
}
