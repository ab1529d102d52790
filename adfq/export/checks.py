"""Quantizers that have a form in ONNX, and the reasons why others have none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from adfq.errors import AdfqError
from adfq.layers import QuantConv2d
from adfq.quantizers import (
    LogQuantizer,
    OutlierQuantizer,
    Quantizer,
    ShiftLogQuantizer,
    ShiftUniformLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)
from adfq.sites import Network, Site, sites_of
from adfq.transforms.positions import has_columns

_BITS = 8
_GRIDS = "it has two steps in one tensor, and an integer product has one for each operand"

#: Reasons why quantizers have no form in ONNX; the first class that a quantizer is an instance of counts.
_REFUSED: Mapping[type[nn.Module], str] = {
    OutlierQuantizer: "its outliers stay in float and its ranges differ from patch to patch, "
    "and an integer product has codes alone, with one scale for each operand",
    ShiftLogQuantizer: "it is shifted by the minimum of what else is in the batch, and powers of a base, shifted, are "
    "no multiples of a step",
    ShiftUniformLogQuantizer: "powers of two, shifted, are no multiples of a step",
    TwinSoftmaxQuantizer: _GRIDS,
    TwinGeluQuantizer: _GRIDS,
}


def check_exportable(model: nn.Module) -> None:
    """Raise AdfqError, with the name of the first site, for a quantizer without a form in ONNX.

    Args:
        model: quantized model.
    """
    network = Network(model)
    for site in sites_of(model):
        quantizer = site.quantizer
        if site.is_weight or quantizer is None:
            continue
        problem = next((reason for cls, reason in _REFUSED.items() if isinstance(quantizer, cls)), None)
        if problem is None and not isinstance(quantizer, LogQuantizer):
            problem = _problem_of_uniform(site, quantizer)
        if problem is not None:
            raise AdfqError(f"{site.name} cannot be exported ({quantizer.describe()}): {problem}")
    for name, layer in network.weight_layers():
        weight = layer.weight_quantizer
        by_row = isinstance(weight, UniformQuantizer) and weight.scale.numel() in (1, len(layer.weight))
        if not by_row and isinstance(weight, Quantizer):
            raise AdfqError(f"{name}.weight_quantizer cannot be exported ({weight.describe()}): only uniform ones can")


def _problem_of_uniform(site: Site, quantizer: Quantizer) -> str | None:
    if not isinstance(quantizer, UniformQuantizer):
        return "ONNX has no operator for it"
    if quantizer.scale.numel() != 1:
        summed = -2 if has_columns(site) else -1
        convolution = isinstance(site.operator, QuantConv2d)
        if convolution or quantizer.scale.shape[summed] != 1 or quantizer.zero_point.unique().numel() != 1:
            return "integers are summed up in a product before they are scaled, so that all in a sum have one grid"
    if quantizer.bits != _BITS:
        return (
            f"integer kernels take {_BITS} bits, and fewer would not make them faster; quantize activations to {_BITS}"
        )
    return None
