"""What a quantized layer IS on disk. A new format is a new file and one import line here."""

from . import fp8, int8  # noqa: F401  (importing registers)
from .base import FORMATS, Format, get_format

__all__ = ["FORMATS", "Format", "get_format"]
