"""What a conversion did and what it cost in quality."""

from .report import LayerResult, Report

__all__ = ["LayerResult", "Report"]
