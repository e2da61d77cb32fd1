"""Mistakes that the values of one layer show, without the original."""

from __future__ import annotations

from collections.abc import Iterable

from ..importers import StoredLayer, Translation
from ..importers.bitsandbytes import LOW_NIBBLE
from ..importers.damage import (
    broken_scales,
    implausible_scale,
    lost_scale,
    nan_codes,
    other_width,
    zero_scales,
)
from .findings import ORIGINAL, REPAIR, Finding, Mistake, findings_of


def _swapped(layer: StoredLayer, made: Translation) -> Iterable[str]:
    if made.dialect == LOW_NIBBLE:
        yield made.note


NIBBLES_SWAPPED = Mistake(
    "nibbles-swapped", "the low nibble comes first under bitsandbytes' names", REPAIR, _swapped
)
SCALE_LOST = Mistake(
    "scale-lost",
    "FP8 codes that fill their range but have no scale: it was probably lost",
    ORIGINAL,
    lost_scale,
)
SCALE_BROKEN = Mistake(
    "scale-not-finite", "a scale that is no positive number", ORIGINAL, broken_scales
)
VALUES = (
    NIBBLES_SWAPPED,
    Mistake("nan-codes", "NaN codes in FP8", ORIGINAL, nan_codes),
    SCALE_LOST,
    SCALE_BROKEN,
    Mistake("scale-zero", "scales of zero beside codes that are not", ORIGINAL, zero_scales),
    Mistake(
        "scale-implausible",
        "weights would be larger than any model's: the scale may be a reciprocal",
        ORIGINAL,
        implausible_scale,
    ),
    Mistake(
        "codes-of-other-width",
        "codes of 8 bits read as pairs of 4 bits, or the other way round",
        ORIGINAL,
        other_width,
    ),
)
# A layer with one of these stays as it is stored: what is made of it would look right.
UNREPAIRABLE = tuple(mistake for mistake in VALUES if mistake.fix is ORIGINAL)


def value_findings(layer: StoredLayer, made: Translation) -> list[Finding]:
    """What codes and scales show, as they are stored: at a glance, or by reading everything
    (importers/damage.py).
    """
    return findings_of(VALUES, layer.name, layer, made)
