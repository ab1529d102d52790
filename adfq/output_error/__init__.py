"""Search for quantizers by the error of a layer's output, the calibration of AdaLog, APHQ-ViT and FIMA-Q."""

from adfq.output_error.calibration import calibrate_by_output_error
from adfq.output_error.settings import APHQ, Settings

__all__ = ["APHQ", "Settings", "calibrate_by_output_error"]
