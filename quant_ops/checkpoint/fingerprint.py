"""What was written of a tensor, to be compared with what is read back."""

from __future__ import annotations

import io
import zlib

# Bytes of a tensor that is compared as a whole, and of each of three samples of a larger one: 20 MB
# in all for a model of 2,000 tensors, which takes 20 ms.
SMALL, SAMPLE = 1 << 16, 1 << 12


class Fingerprint:
    """A checksum of the bytes of a tensor, or of samples from its start, middle and end.

    Args:
        size: bytes of the tensor.
        whole: of every byte, however large.
    """

    def __init__(self, size: int, whole: bool = False):
        self.size = size
        middle = (size - SAMPLE) // 2
        starts = (0, middle, size - SAMPLE)
        self._spans = [(start, start + SAMPLE) for start in starts]
        if whole or size <= SMALL:
            self._spans = [(0, size)]
        self._at = 0
        self._sum = 0

    def add(self, view: memoryview) -> None:
        """The next bytes of the tensor."""
        for begin, end in self._spans:
            part = view[max(begin - self._at, 0) : max(end - self._at, 0)]
            self._sum = zlib.crc32(part, self._sum)
        self._at += len(view)

    def is_of(self, file: io.RawIOBase, offset: int) -> bool:
        """Whether a file has these bytes from `offset` on."""
        found = 0
        for begin, end in self._spans:
            file.seek(offset + begin)
            left = end - begin
            while left:
                data = file.read(min(left, 1 << 24))
                if not data:
                    return False
                found = zlib.crc32(data, found)
                left -= len(data)
        return self._at == self.size and found == self._sum
