"""Quantizers, one concept a file.

A quantizer is calibrated once and is a pure function from then on.
"""

from adfq.quantizers.adalog import AdaLogQuantizer
from adfq.quantizers.affine_uniform import AffineUniformQuantizer
from adfq.quantizers.base import Quantizer
from adfq.quantizers.dual_uniform import DualUniformQuantizer
from adfq.quantizers.log import LogQuantizer
from adfq.quantizers.numerator import NumeratorQuantizer
from adfq.quantizers.per_patch import OutlierQuantizer, PerPatchOutlierQuantizer, RunTimePatchOutlierQuantizer
from adfq.quantizers.shift_log import ShiftLogQuantizer
from adfq.quantizers.shift_uniform_log import ShiftUniformLogQuantizer
from adfq.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer
from adfq.quantizers.uniform import UniformQuantizer

__all__ = [
    "AdaLogQuantizer",
    "AffineUniformQuantizer",
    "DualUniformQuantizer",
    "LogQuantizer",
    "NumeratorQuantizer",
    "OutlierQuantizer",
    "PerPatchOutlierQuantizer",
    "Quantizer",
    "RunTimePatchOutlierQuantizer",
    "ShiftLogQuantizer",
    "ShiftUniformLogQuantizer",
    "TwinGeluQuantizer",
    "TwinSoftmaxQuantizer",
    "UniformQuantizer",
]
