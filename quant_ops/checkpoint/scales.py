"""Whether stored scales can be scales: numbers that are there, and not negative."""

from __future__ import annotations

import torch

from ..sources import DTYPE_NAMES

# Side tensors that multiply codes, by the last part of their name; True: of either sign.
SCALES = {
    "weight_scale": False, "weight_scale_2": False, "scale_weight": False, "absmax": False,
    "nested_absmax": False, "weight_s_rel": False, "weight_s_channel": False,
    "weight_codebook": True, "weight_correction": True, "nested_quant_map": True,
    "quant_map": True, "pre_quant_scale": True, "scales": False, "scaled_zeros": True,
    "wscales": False, "wcscales": False, "wtscale": False, "wzeros": True, "smooth": False,
    "smooth_factor": False, "lora_up": True, "lora_down": True, "proj_up": True, "proj_down": True,
    "_scale": False, "_shift": True, "SCB": False, "weight_scale_inv": False,
    "weight_global_scale": False, "weight_zeros": True,
}  # fmt: skip
# bitsandbytes rounds the absmax of a layer around their mean, to steps of up to 0.9 / 64 of the
# largest: half a step below zero is where a block of zeros may come out.
ROUNDED = 0.9 / 128
E8M0_NAN = 255


def scale_problem(tensors: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with the scales of a layer; None when nothing is.

    Args:
        tensors: by suffix, as stored or canonical. Exponents stored as U8 are told from codes by
            the weight beside them.
    """
    for suffix, tensor in tensors.items():
        signed = SCALES.get(suffix.rpartition(".")[2])
        if signed is None or not tensor.numel():
            continue
        values = _values(suffix, tensor, tensors.get("weight"))
        broken = values is not None and _broken(values, signed, suffix.endswith("absmax"))
        if broken:
            return f"{suffix} has {broken} of {tensor.numel()} values"
    return None


def _values(suffix: str, tensor: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
    """As float32; None for what holds codes."""
    if tensor.dtype == torch.float8_e8m0fnu:
        tensor = tensor.view(torch.uint8)
    if tensor.dtype == torch.uint8:
        exponents = (
            suffix == "weight_scale"
            and weight is not None
            and DTYPE_NAMES.get(weight.dtype) == "F8_E4M3"
        )
        if exponents:
            return tensor.float().masked_fill_(tensor == E8M0_NAN, float("nan"))
        return None
    if tensor.is_floating_point():
        return tensor.float()
    return None


def _broken(values: torch.Tensor, signed: bool, rounded: bool) -> str | None:
    """Counts of what no scale can be."""
    low, high = torch.aminmax(values)
    largest = float(high)
    floor = -ROUNDED * largest if rounded else 0.0
    if signed:
        floor = float("-inf")
    if bool(low >= floor) and bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return None
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    negative = 0 if signed else int((values < floor).sum())
    counts = {"NaN": nan, "infinite": infinite, "negative": negative}
    return " and ".join(f"{count} {name}" for name, count in counts.items() if count)
