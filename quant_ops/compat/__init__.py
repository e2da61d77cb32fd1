"""The classic tool's command and API over the same engine: no logic of its own, two tables and a
converter.
"""

from .api import convert_fp8_scaled_to_comfy_quant, convert_to_fp8_scaled, main, quantize
from .converter import LearnedRoundingConverter

__all__ = [
    "LearnedRoundingConverter",
    "convert_fp8_scaled_to_comfy_quant",
    "convert_to_fp8_scaled",
    "main",
    "quantize",
]
