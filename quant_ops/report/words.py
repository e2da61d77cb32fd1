"""What an error of weights means, in words, and the measurement that the words rest on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .layer import Retention

# (rel_l2 of all quantized weights, mean SSIM of the pictures against 16 bit): the formats of the
# table in docs/quality.md on the emoji model, but for the one that rounds activations to 4 bits.
MEASURED = (
    (0.0068, 0.996), (0.0072, 0.998), (0.0077, 0.995), (0.0134, 0.995), (0.0213, 0.990),
    (0.0249, 0.990), (0.0261, 0.990), (0.0264, 0.991), (0.0265, 0.997), (0.0266, 0.996),
    (0.0527, 0.984), (0.0726, 0.964), (0.0862, 0.953), (0.0930, 0.948), (0.0947, 0.950),
    (0.1155, 0.909), (0.1249, 0.887),
)  # fmt: skip
BASIS = "on one small trained model, 8 prompts (docs/quality.md)"
# lowest SSIM -> what a person sees
SEEN = (
    (0.985, "pictures that are hard to tell from the original's side by side"),
    (0.94, "the same pictures with other details"),
    (-1.0, "visibly different pictures"),
)
NEAR = 1.2  # x: measured errors that are spoken of for another one


def in_words(rel_l2: float) -> str:
    """What an error of this size went with where it was measured; not a promise."""
    if rel_l2 == 0:
        return "no weight has changed"
    near = [ssim for error, ssim in MEASURED if 1 / NEAR <= error / rel_l2 <= NEAR]
    if not near:
        return _unmeasured(rel_l2)
    low, high = min(near), max(near)
    seen = seen_at(low)[1]
    span = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
    return f"errors like this went with {seen}: SSIM {span} {BASIS}"


def seen_at(ssim: float) -> tuple[int, str]:
    """What a person sees at this SSIM against the original: its place in `SEEN`, and the words."""
    return next((place, words) for place, (least, words) in enumerate(SEEN) if ssim >= least)


def patches_in_words(found: Sequence[Retention]) -> str:
    """What is left of a LoRA that was baked in: of each layer one."""
    survived = statistics.median(each.survived for each in found)
    noise = statistics.median(each.noise for each in found)
    drowned = sum(each.drowned for each in found)
    said = (
        f"LoRA baked in: {survived:.0%} of it survives rounding, which moves the weights "
        f"{noise:.2g} x as far as it did (medians of {len(found)} layers)"
    )
    if not drowned:
        return said
    return (
        f"{said}; in {drowned} of {len(found)} layers it drowns, less than half survives: use more "
        "bits, or apply it to the quantized model"
    )


def _unmeasured(rel_l2: float) -> str:
    errors = [error for error, _ in MEASURED]
    if rel_l2 < errors[0]:
        return f"less error than any that was measured {BASIS}"
    if rel_l2 > errors[-1]:
        return f"more error than any that was measured {BASIS}: look at pictures before you keep it"
    return f"no error like this was measured {BASIS}"
