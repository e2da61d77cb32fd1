"""What a quantized layer IS on disk. A new format is a new file and one import line here."""

# importing registers
from . import asym_w4a8, bnb_4bit, convrot_w4a4, fp8, int8, mxfp8, nvfp4  # noqa: F401
from .arrangement import Arrangement
from .base import (
    FORMATS,
    Format,
    FormatOptions,
    find_format,
    get_format,
    option_values,
    own_methods,
    read_as,
    short_names,
    wished_format,
)

__all__ = [
    "FORMATS",
    "Arrangement",
    "Format",
    "FormatOptions",
    "find_format",
    "get_format",
    "option_values",
    "own_methods",
    "read_as",
    "short_names",
    "wished_format",
]
