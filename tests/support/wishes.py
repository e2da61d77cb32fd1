"""Every format and variant that the end-to-end tests write, and the quality each must keep."""

from __future__ import annotations

from pathlib import Path

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from support.harness import EMOJI

VARIANTS = {  # label -> wish, beside each format with its defaults; a label begins with the format's name
    "int8_tensorwise, one scale": "int8_tensorwise:scaling=tensor",
    "int8_tensorwise, ConvRot": "int8_tensorwise:convrot=true",
    "bnb_fp4, nearest": "bnb_fp4:method=nearest",
    "bnb_nf4, mse_clip": "bnb_nf4:method=mse_clip",
}
# Label -> wish.
WISHES = dict(sorted({**{name: name for name in FORMATS}, **VARIANTS}.items()))

# Lowest mean SSIM over the eight prompts. The first two and 4 bits are promises; measured where it is less:
LEAST = {
    "bnb_nf4, mse_clip": 0.93,
    "float8_e4m3fn": 0.985,
    "int8_tensorwise": 0.985,
    "bnb_nf4": 0.93,
    "bnb_fp4": 0.90,
    "bnb_fp4, nearest": 0.87,  # 0.887: why mse_clip is the format's own method
    "nvfp4": 0.93,
    "asym_w4a8_int8": 0.93,
    "convrot_w4a4": 0.60,  # 0.668: ComfyUI rounds its activations to 4 bits too
}
OTHER_8_BIT = 0.97


def least_ssim(label: str) -> float:
    return LEAST.get(label, OTHER_8_BIT)


def write_emoji(folder: Path, label: str) -> Path:
    """The emoji model in one of WISHES, written by the file door."""
    path = folder / f"emoji_{label.replace(', ', '_').replace(' ', '_')}.safetensors"
    quantize_file(EMOJI / "emoji_flux.safetensors", path, Recipe(parse_wish(WISHES[label])))
    return path
