"""Quantizers that have a form in ONNX, and the reasons why others have none."""

from __future__ import annotations

from torch import nn

from adfq.errors import NotApplicableError
from adfq.export.forms import has_form
from adfq.quantizers import (
    DualUniformQuantizer,
    OutlierQuantizer,
    Quantizer,
    ShiftLogQuantizer,
    UniformQuantizer,
)
from adfq.sites import Network, sites_of

_BITS = 8


def check_exportable(model: nn.Module) -> None:
    """Raise NotApplicableError, with the name of the first site, for a quantizer without a form in ONNX.

    Args:
        model: quantized model.
    """
    network = Network(model)
    for site in sites_of(model):
        quantizer = site.quantizer
        if site.is_weight or quantizer is None:
            continue
        problem = _problem_of(quantizer)
        if problem is not None:
            raise NotApplicableError(f"{site.name} cannot be exported ({quantizer.describe()}): {problem}")
    for name, layer in network.weight_layers():
        weight = layer.weight_quantizer
        by_row = isinstance(weight, UniformQuantizer) and weight.scale.numel() in (1, len(layer.weight))
        if not by_row and not isinstance(weight, DualUniformQuantizer) and isinstance(weight, Quantizer):
            raise NotApplicableError(
                f"{name}.weight_quantizer cannot be exported ({weight.describe()}): only uniform ones can"
            )


def _problem_of(quantizer: Quantizer) -> str | None:
    if isinstance(quantizer, ShiftLogQuantizer) and quantizer.shift == "dynamic":
        return "it is shifted by the minimum of what else is in the batch"
    if not has_form(quantizer):
        run_time = isinstance(quantizer, OutlierQuantizer)
        return "its ranges are found at run time, patch by patch" if run_time else "ONNX has no operator for it"
    if isinstance(quantizer, UniformQuantizer) and quantizer.bits != _BITS:
        return (
            f"integer kernels take {_BITS} bits, and fewer would not make them faster; quantize activations to {_BITS}"
        )
    return None
