"""What was seen of a model's inputs while it ran, collected, stored and handed to methods."""

from .calibration import Calibration, load_calibration, save_calibration
from .observer import Observer
from .statistics import InputStatistics

__all__ = ["Calibration", "InputStatistics", "Observer", "load_calibration", "save_calibration"]
