"""What a conversion did and what it cost in quality."""

from .layer import LayerResult
from .report import Report

__all__ = ["LayerResult", "Report"]
