"""What was seen of a model's inputs while it ran, collected, stored and handed to methods."""

from .calibration import Calibration, load_calibration
from .statistics import InputStatistics

__all__ = ["Calibration", "InputStatistics", "load_calibration"]
