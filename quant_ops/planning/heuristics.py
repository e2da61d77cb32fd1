"""Which layers gain too little from quantization to be worth its error, judged by shape alone
(`--heur`).
"""

from __future__ import annotations

from ..formats import get_format
from ..spec import LayerInput
from .recipe import Wish

# The classic command's thresholds: below them the matmul is bound by launches and memory traffic,
# not by arithmetic.
MOST_STRETCHED = 4  # long side / short side ...
SHORT_SIDE = 5120  # ... matters only where the short side is below this
SQUARE, SMALL = 2, 15_000_000  # nearly square layers with fewer elements
LONG_SIDE = 4096


def gains_nothing(layer: LayerInput, wish: Wish) -> str | None:
    """Why this (N, K) is not worth quantizing as wished; None when it is. An empty layer gains
    nothing.
    """
    long, short = max(layer.shape), min(layer.shape)
    block = getattr(wish.options, "block_size", None)
    if block and short < block:
        return f"short side {short} < block {block}"
    obstacle = get_format(wish.format).check(layer, wish.options)
    if obstacle:
        return obstacle
    if long > MOST_STRETCHED * short and short < SHORT_SIDE:
        return f"aspect ratio {long}:{short} > {MOST_STRETCHED} with a short side < {SHORT_SIDE}"
    if long * short < SMALL and long < SQUARE * short:
        return f"{long * short} elements < {SMALL} with aspect ratio < {SQUARE}"
    if long < LONG_SIDE:
        return f"long side {long} < {LONG_SIDE}"
    return None
