"""How the weights of a matrix share scales, as far as shapes show it."""

from __future__ import annotations

from enum import Enum

from ...kernels.scales import Geometry


class Arrangement(str, Enum):
    """One scale for the tensor, per row, per `size` weights of a row, or per `size` x `size`
    tile.
    """

    TENSOR = "tensor"
    ROW = "row"
    GROUP = "group"
    TILE = "tile"

    @property
    def words(self) -> str:
        return WORDS[self]

    def geometry(self, size: int | None = None) -> Geometry:
        """The tiles of a weight; `size` only where there are blocks."""
        if self is Arrangement.TENSOR:
            return Geometry(None, None)
        if self is Arrangement.ROW:
            return Geometry(1, None)
        return Geometry(1 if self is Arrangement.GROUP else size, size)


WORDS = {
    Arrangement.TENSOR: "one scale",
    Arrangement.ROW: "one scale per row",
    Arrangement.GROUP: "one scale per block of a row",
    Arrangement.TILE: "one scale per square tile",
}
