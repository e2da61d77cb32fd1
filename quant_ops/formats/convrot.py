"""What rotated formats share: which rotation groups are written and read, and the next smaller one
that fits.
"""

from __future__ import annotations

from ...kernels.hadamard import is_group_size
from ..errors import CheckpointError
from ..spec import LayerInput
from .base import stated_in

WRITTEN = (256, 64, 16)
LARGEST = WRITTEN[0]
READ = (4, 1024)  # in files of other writers, beside those
AUTO = "auto"  # rotate the layers that allow it


def smaller_group(layer: LayerInput, group: int) -> int | None:
    """The largest written group below `group` that divides K."""
    return next((size for size in WRITTEN if size < group and layer.shape[1] % size == 0), None)


def refusal(layer: LayerInput, group: int) -> str | None:
    """Why K cannot be rotated in groups of this size, and what is done instead; None when it
    can.
    """
    k = layer.shape[1]
    if k % group == 0:
        return None
    return f"ConvRot {group} -> {smaller_group(layer, group) or 'none'}: K={k}"


def stored_group(marker: dict, layer: LayerInput) -> int:
    """The group of a stored layer, 256 unless the marker says otherwise.

    Raises:
        CheckpointError: not a power of 4 from 4 to 1024, or it does not divide K.
    """
    group = stated_in(marker, "convrot_groupsize", LARGEST)
    if type(group) is not int or not is_group_size(group) or layer.shape[1] % group:
        raise CheckpointError(
            f"convrot_groupsize is {group!r}: a power of 4 (4 to 1024) that divides K is needed"
        )
    return group
