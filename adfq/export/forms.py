"""Forms of quantizers in ONNX's operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adfq.quantizers import (
    AdaLogQuantizer,
    AffineUniformQuantizer,
    LogQuantizer,
    NumeratorQuantizer,
    PerPatchOutlierQuantizer,
    Quantizer,
    ShiftLogQuantizer,
    ShiftUniformLogQuantizer,
    TwinGeluQuantizer,
    TwinSoftmaxQuantizer,
    UniformQuantizer,
)
from adfq.quantizers.adalog import SMALLEST as ADALOG_SMALLEST
from adfq.quantizers.shift_log import EPSILON as SHIFT_EPSILON


def convert_quantizer(quantizer: nn.Module) -> nn.Module:
    """Return a quantizer in ONNX's operators, outside of integer products; full precision as it is.

    Args:
        quantizer: a `Quantizer` that `check_exportable` accepts, or nn.Identity.
    """
    if not isinstance(quantizer, Quantizer):
        return quantizer
    return next(form(quantizer) for cls, form in _FORMS.items() if isinstance(quantizer, cls))


def has_form(quantizer: Quantizer) -> bool:
    """Return True for a quantizer that `convert_quantizer` can convert.

    Args:
        quantizer: calibrated quantizer.
    """
    return isinstance(quantizer, tuple(_FORMS))


class Grid(nn.Module):
    """Grid of a `UniformQuantizer` in ONNX's form, with a zero point that is a code.

    Values are scale·(q - zero_point) + offset. The offset is 0 unless the range leaves out 0, as that of probabilities
    that are all large can, or the quantizer's zero point is no whole number. An activation with several scales is
    divided by them before, and has a scale of 1 in ONNX: they are factors of the product's output.

    Args:
        quantizer: calibrated uniform quantizer.
        signed: True for int8 codes around 0, as kernels want weights; False, the default, for uint8. x86 multiplies
            uint8 with int8 (VNNI) in half the time of two uint8.

    Attributes:
        scale: float32, the shape of the quantizer's scale without dimensions of 1.
        zero_point: uint8 or int8, the shape of `scale`.
        offset: float32, the shape of `scale`; None for 0.
        factor: float32, the scales that an activation is divided by, which broadcast against it; None for one scale.
    """

    factor: Tensor | None
    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None

    def __init__(self, quantizer: UniformQuantizer, signed: bool = False) -> None:
        super().__init__()
        self.shift, self.dtype = (quantizer.levels // 2, torch.int8) if signed else (0, torch.uint8)
        # RepQ-ViT's zero point is a mean of whole numbers. Steps are counted from 0 on either way, so that rounding it
        # changes only the values at the ends of the range that are cut off, by less than a step.
        several = not signed and quantizer.scale.numel() > 1
        self.register_buffer("factor", quantizer.scale.clone() if several else None)
        wanted, scale = quantizer.zero_point.squeeze(), quantizer.scale.squeeze()
        if several:
            wanted, scale = wanted.flatten()[0], torch.ones(())
        if not isinstance(quantizer, AffineUniformQuantizer):
            wanted = wanted.round()
        zero_point = wanted.round().clamp(0, quantizer.levels - 1)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", self.shift_codes(zero_point))
        # onnxruntime cannot read a file in which weights share a zero point, which is 0 where there is none.
        self.without_zero_point = signed and not self.zero_point.any()
        offset = scale * (zero_point - wanted)
        self.register_buffer("offset", offset if offset.any() else None)

    def shift_codes(self, codes: Tensor) -> Tensor:
        """Return the quantizer's codes in ONNX's type."""
        return (codes.int() - self.shift).to(self.dtype)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of `x`, by ONNX's operator."""
        x = x if self.factor is None else x / self.factor
        operands = [x if self.offset is None else x - self.offset, self.scale, self.zero_point]
        codes: Tensor = torch.onnx.ops.symbolic("QuantizeLinear", operands, dtype=self.dtype, shape=x.shape)
        return codes

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of codes without the offset; several scales belong to the last dimension."""
        operands = [codes, self.scale, *([] if self.without_zero_point else [self.zero_point])]
        values: Tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear", operands, {"axis": codes.dim() - 1}, dtype=torch.float32, shape=codes.shape
        )
        return values


class QuantizeDequantize(nn.Module):
    """Uniform quantizer of an activation outside of integer products."""

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        self.grid = Grid(quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        values = self.grid.dequantize(self.grid.quantize(x))
        values = values if self.grid.offset is None else values + self.grid.offset
        return values if self.grid.factor is None else values * self.grid.factor


class NumeratorGrid(Grid):
    """Grid of a `NumeratorQuantizer`: codes of the shares of each row's largest value."""

    def __init__(self, quantizer: NumeratorQuantizer) -> None:
        uniform = UniformQuantizer(quantizer.bits)
        uniform.set_range(quantizer.scale, torch.zeros_like(quantizer.scale))
        super().__init__(uniform)


class Numerators(nn.Module):
    """`NumeratorQuantizer` outside of integer products."""

    def __init__(self, quantizer: NumeratorQuantizer) -> None:
        super().__init__()
        self.grid = NumeratorGrid(quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        highest = x.amax(-1, keepdim=True)
        values = self.grid.dequantize(self.grid.quantize(x / highest)) * highest
        return values + (x.sum(-1, keepdim=True) - values.sum(-1, keepdim=True)) / x.shape[-1]


class SeveralGrids(nn.Module):
    """Uniform quantizer whose zero points differ, in float operators; with outliers, if it keeps these."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        self.highest, self.affine = quantizer.levels - 1, isinstance(quantizer, AffineUniformQuantizer)
        self.threshold = quantizer.threshold if isinstance(quantizer, PerPatchOutlierQuantizer) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        steps = x / self.scale
        codes = (steps + self.zero_point).round() if self.affine else steps.round() + self.zero_point
        values = (codes.clamp(0, self.highest) - self.zero_point) * self.scale
        return values if self.threshold is None else torch.where(x.abs() > self.threshold, x, values)


def _convert_uniform(quantizer: UniformQuantizer) -> nn.Module:
    return QuantizeDequantize(quantizer) if quantizer.zero_point.unique().numel() == 1 else SeveralGrids(quantizer)


class Logarithmic(nn.Module):
    """`LogQuantizer` in operators with vectorized kernels in onnxruntime, which has none for powers of 2."""

    scale: Tensor
    shift: Tensor | None

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("shift", None)
        if isinstance(quantizer, ShiftLogQuantizer):  # a static one
            self.shift = quantizer.minimum - SHIFT_EPSILON
        self.levels, self.step = quantizer.levels, math.log(quantizer.base)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        shifted = x if self.shift is None else x - self.shift
        codes = ((shifted / self.scale).clamp(0, 1).log() * (-1 / self.step)).round()
        # Log 0 is beyond every code.
        values = torch.where(codes < self.levels, (codes * -self.step).exp() * self.scale, 0.0)
        return values if self.shift is None else values + self.shift


class LogarithmicTable(nn.Module):
    """`AdaLogQuantizer` or `ShiftUniformLogQuantizer`: a uniform code of the logarithm, and a table of its values."""

    shift: Tensor
    lowest: Tensor
    highest: Tensor
    slope: Tensor
    start: Tensor
    table: Tensor

    def __init__(self, quantizer: AdaLogQuantizer | ShiftUniformLogQuantizer) -> None:
        super().__init__()
        if isinstance(quantizer, AdaLogQuantizer):
            levels, per_octave = quantizer.level_table(quantizer.q, quantizer.training_form)
            table = levels * quantizer.scale - (0.0 if quantizer.folded else quantizer.shift)
            shift, start, slope = torch.tensor(quantizer.shift), quantizer.scale.log2(), -per_octave
            lowest, highest = quantizer.scale * ADALOG_SMALLEST, quantizer.scale
        else:
            shift, start, slope = quantizer.shift, quantizer.log_min, 1 / quantizer.scale
            codes = torch.arange(quantizer.highest + 1, device=slope.device)
            table = (codes * quantizer.scale + start).round().exp2() - shift
            lowest, highest = torch.tensor(torch.finfo().tiny), torch.tensor(torch.finfo().max)
        parts = {"shift": shift, "lowest": lowest, "highest": highest, "slope": slope, "start": start, "table": table}
        for name, part in parts.items():
            self.register_buffer(name, part.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        logarithms = torch.minimum(torch.maximum(x + self.shift, self.lowest), self.highest).log() * (1 / math.log(2))
        codes = ((logarithms - self.start) * self.slope).round().clamp(0, len(self.table) - 1)
        # An index would be traced to GatherND, an embedding is to Gather.
        return nn.functional.embedding(codes.long(), self.table[:, None])[..., 0]


class TwinSoftmax(nn.Module):
    """`TwinSoftmaxQuantizer` in float operators."""

    scale: Tensor

    def __init__(self, quantizer: TwinSoftmaxQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.clone())
        self.steps, self.released = quantizer.steps, quantizer.released

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        split = self.scale * self.steps
        fine = (x / self.scale).clamp(0, self.steps).round() * self.scale
        coarse = (torch.maximum(x, split).clamp(max=1) * self.steps).round() / self.steps
        return fine + coarse if self.released else torch.where(x <= split, fine, torch.maximum(coarse, split))


class TwinGelu(nn.Module):
    """`TwinGeluQuantizer` in float operators."""

    scale: Tensor

    def __init__(self, quantizer: TwinGeluQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.clone())
        self.count, self.negative_scale = quantizer.levels // 2, quantizer.negative_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        below = (x / self.negative_scale).round().clamp(-self.count, 0) * self.negative_scale
        return (x / self.scale).round().clamp(0, self.count - 1) * self.scale + below


#: Forms by class of quantizer; the first class that a quantizer is an instance of counts.
_FORMS: Mapping[type[Quantizer], Callable[[Any], nn.Module]] = {
    PerPatchOutlierQuantizer: SeveralGrids,
    UniformQuantizer: _convert_uniform,
    LogQuantizer: Logarithmic,
    NumeratorQuantizer: Numerators,
    AdaLogQuantizer: LogarithmicTable,
    ShiftUniformLogQuantizer: LogarithmicTable,
    TwinSoftmaxQuantizer: TwinSoftmax,
    TwinGeluQuantizer: TwinGelu,
}
