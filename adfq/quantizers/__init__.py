"""Quantizers, one concept a file.

A quantizer is calibrated once and is a pure function from then on.
"""

from adfq.quantizers.adalog import AdaLogQuantizer
from adfq.quantizers.base import Quantizer
from adfq.quantizers.log import LogQuantizer
from adfq.quantizers.per_patch import OutlierQuantizer, PerPatchOutlierQuantizer, RunTimePatchOutlierQuantizer
from adfq.quantizers.shift_log import ShiftLogQuantizer
from adfq.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer
from adfq.quantizers.uniform import UniformQuantizer

__all__ = [
    "AdaLogQuantizer",
    "LogQuantizer",
    "OutlierQuantizer",
    "PerPatchOutlierQuantizer",
    "Quantizer",
    "RunTimePatchOutlierQuantizer",
    "ShiftLogQuantizer",
    "TwinGeluQuantizer",
    "TwinSoftmaxQuantizer",
    "UniformQuantizer",
]
