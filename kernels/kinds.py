"""The kinds of codes that products exist for."""

from __future__ import annotations

from enum import IntEnum

import torch


class Codes(IntEnum):
    """The value is what the CUDA sources call KIND."""

    FOUR_BIT = 4
    INT8 = 8
    FP8 = 9

    @classmethod
    def of(cls, dtype: torch.dtype) -> Codes:
        """The kind of stored codes: uint8 holds two of four bits."""
        return _BY_DTYPE[dtype]


_BY_DTYPE = {
    torch.uint8: Codes.FOUR_BIT,
    torch.int8: Codes.INT8,
    torch.float8_e4m3fn: Codes.FP8,
}
