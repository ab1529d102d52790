"""Forms of quantizers in ONNX's operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adfq.quantizers import AffineUniformQuantizer, LogQuantizer, UniformQuantizer


def convert_quantizer(quantizer: nn.Module) -> nn.Module:
    """Return a quantizer in ONNX's operators, outside of integer products; one without such a form as it is.

    Args:
        quantizer: a `Quantizer`, or nn.Identity.
    """
    if isinstance(quantizer, UniformQuantizer):
        return QuantizeDequantize(quantizer)
    return Logarithmic(quantizer) if isinstance(quantizer, LogQuantizer) else quantizer


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


class Logarithmic(nn.Module):
    """`LogQuantizer` in operators with vectorized kernels in onnxruntime, which has none for powers of 2."""

    scale: Tensor

    def __init__(self, quantizer: LogQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.clone())
        self.levels, self.step = quantizer.levels, math.log(quantizer.base)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x`."""
        codes = ((x / self.scale).clamp(0, 1).log() * (-1 / self.step)).round()
        # Log 0 is beyond every code.
        return torch.where(codes < self.levels, (codes * -self.step).exp() * self.scale, 0.0)
