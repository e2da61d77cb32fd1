"""Codes and scales in their stored arrangement: two 4-bit codes per byte, swizzled block scales,
zero padding.
"""

from __future__ import annotations

import torch

from .dispatch import op
from .memory import empty
from .scales import CHUNK_ELEMENTS, chunk_rows
from .triton import why_not_triton


def round_up(size: int, step: int) -> int:
    """`size` rounded up to a multiple of `step`."""
    return -(-size // step) * step


def pad_to(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """(N, K) -> (rows, cols), new elements zero; the tensor itself when nothing is missing."""
    n, k = x.shape
    if (n, k) == (rows, cols):
        return x
    return torch.nn.functional.pad(x, (0, cols - k, 0, rows - n))


def pack_nibbles(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    """byte = code[2j] << 4 | code[2j+1] (high first) or code[2j] | code[2j+1] << 4 (low first).

    Args:
        codes: (N, K) contiguous, one byte each, of which the low 4 bits count (two's complement is
            fine); K even.

    Returns:
        (N, K/2) uint8.
    """
    return packed_nibbles(codes, high_first)


@op
def packed_nibbles(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    """What `pack_nibbles` returns."""
    n, k = codes.shape
    packed = empty((n, k // 2), torch.uint8, codes.device)
    rows = chunk_rows(CHUNK_ELEMENTS, k, codes.device)
    for start in range(0, n, rows):
        # Both codes of a byte in one int16, the even one in its low half (all supported machines
        # are little-endian): 0.12 ns per code where slicing with a stride of two took 0.41 (two CPU
        # cores).
        pairs = codes[start : start + rows].view(torch.int16) & 0x0F0F
        packed[start : start + rows] = (
            (pairs << 4) | (pairs >> 8) if high_first else pairs | (pairs >> 4)
        ) & 0xFF
    return packed


@packed_nibbles.backend("triton", lambda codes, *order: why_not_triton(codes))
def _packed_nibbles(codes, high_first):
    from .triton import encode

    return encode.pack(codes, high_first)


def unpack_nibbles(packed: torch.Tensor, high_first: bool) -> torch.Tensor:
    """(N, K/2) bytes -> (N, K) uint8 codes 0..15, the inverse of `pack_nibbles`."""
    n, half = packed.shape
    packed = packed.contiguous().view(torch.uint8)
    codes = torch.empty((n, 2 * half), dtype=torch.uint8, device=packed.device)
    first, second = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    codes[:, 0::2], codes[:, 1::2] = first, second
    return codes


def swizzled_shape(rows: int, cols: int) -> tuple[int, int]:
    """Stored shape of a (rows, cols) grid of block scales."""
    return round_up(rows, 128), round_up(cols, 4)


def swizzle_scales(grid: torch.Tensor) -> torch.Tensor:
    """Block scales in cuBLAS order: zero-padded to (R, C) = multiples of (128, 4), stored with that
    shape.

    The flat offset of logical (r, c) is
    ((r//128) * (C/4) + c//4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4.
    """
    rows, cols = swizzled_shape(*grid.shape)
    tiles = pad_to(grid, rows, cols).reshape(rows // 128, 4, 32, cols // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, cols)


def unswizzle_scales(stored: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Stored block scales -> the logical (rows, cols) grid."""
    padded_rows, padded_cols = swizzled_shape(rows, cols)
    tiles = stored.reshape(padded_rows // 128, padded_cols // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_cols)[:rows, :cols]
