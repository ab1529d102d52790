"""Quantized models as ONNX files in which integers are multiplied with integers.

Files are in QDQ form (ONNX operator specification): `QuantizeLinear` and `DequantizeLinear` enclose the values that
quantization simulates. onnxruntime recognizes a product whose operands both come out of a `DequantizeLinear` and runs
it on codes. This package makes every product such a one, as far as its quantizers allow it.
"""

from __future__ import annotations

import copy
import importlib
import os

from torch import nn

from adfq.api import Quantization
from adfq.errors import AdfqError
from adfq.export.checks import check_exportable
from adfq.export.products import Exported, convert
from adfq.export.storage import writing
from adfq.export.trace import trace
from adfq.sites import check_weights

_NOT_CLASSIFIERS = ("mmdet.", "segment_anything.", "adfq.adapters.mobile_sam.")  # beginnings of families

__all__ = ["Exported", "check_installed", "export_onnx"]


def export_onnx(model: nn.Module, file: str | os.PathLike[str]) -> Exported:
    """Write a quantized model to one ONNX file in QDQ form; above 2 GB, its weights to ``FILE.data`` beside it.

    The input ``images`` is float32, B×C×H×W with any B; the output ``logits`` is float32, B×classes. Activations become
    uint8 at run time, with one scale each. Weights are stored as int8, and at four bits or fewer as int4, with a
    scale and zero point for each output channel. Layers that a method leaves in full precision stay float32.

    Args:
        model: model from `adfq.quantize` or `adfq.load`; not changed.
        file: path to write, or to replace.

    Returns:
        Names of the integer and the floating-point products.

    Raises:
        AdfqError: for a model that is not from `adfq.quantize`, is no classifier or cannot be traced;
            for weights that were trained after quantization (`adfq.requantize`); for quantizers without a form in
            ONNX and activations of other than 8 bits, with the name of the first site; without the extra ``onnx``; for
            a file that cannot be written.
    """
    quantization = getattr(model, "quantization", None)
    if not isinstance(quantization, Quantization):
        raise AdfqError("only a model that adfq.quantize has quantized can be exported")
    if quantization.architecture.family.startswith(_NOT_CLASSIFIERS):
        raise AdfqError(f"a {type(model).__name__} cannot be exported: only classifiers can")
    check_weights(model)
    check_exportable(model)
    check_installed()
    model = copy.deepcopy(model).cpu().float().eval()
    exported = convert(model)
    with writing(trace(model, quantization.architecture.input_size), file):
        return exported


def check_installed() -> None:
    """Raise AdfqError unless the extra ``onnx`` is installed."""
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            importlib.import_module(package)
    except ImportError as error:
        raise AdfqError(f"exporting needs {error.name}: pip install 'adfq[onnx]'") from None
