"""Calibration of a network on any number of images, with memory for one batch."""

from adfq.calibration.activations import calibrate_activations, calibrating, check_input, progress_bar, quantize_weights
from adfq.calibration.images import CalibrationImages, read_images

__all__ = [
    "CalibrationImages",
    "calibrate_activations",
    "calibrating",
    "check_input",
    "progress_bar",
    "quantize_weights",
    "read_images",
]
