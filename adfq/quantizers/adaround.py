"""Learned rounding of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adfq.quantizers.uniform import UniformQuantizer

#: h(α) = clamp((ζ - γ)·sigmoid(α) + γ, 0, 1) reaches 0 and 1 at finite α (Louizos et al., 2018).
_STRETCH, _OFFSET = 1.2, -0.1


class AdaRound(nn.Module):
    """AdaRound's learned rounding of one weight (Nagel et al., 2020).

    Ŵ = scale·(clamp(floor(W/scale) + h(α) + zero_point, 0, 2^bits - 1) - zero_point), with α learned and h(α) the
    rectified sigmoid. The grid is that of a calibrated quantizer. h(α) starts as the fractional part of W/scale, so
    that `soft` returns W itself as far as the grid reaches, and `hard` its nearest values.

    Args:
        weight: full-precision weight of any shape.
        grid: uniform quantizer, calibrated on `weight`.

    Attributes:
        alpha: α; float32 parameter of the weight's shape.
        floor: floor(W/scale) + zero_point; float32, the weight's shape.
        scale: `grid.scale`.
        zero_point: `grid.zero_point`.
    """

    floor: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, grid: UniformQuantizer) -> None:
        super().__init__()
        ratio = weight.detach().float() / grid.scale
        self.highest = grid.levels - 1
        self.register_buffer("scale", grid.scale)
        self.register_buffer("zero_point", grid.zero_point)
        self.register_buffer("floor", ratio.floor() + grid.zero_point)
        self.alpha = nn.Parameter(torch.logit((ratio - ratio.floor() - _OFFSET) / _STRETCH))

    def soft(self) -> Tensor:
        """Return the weight at the present h(α): float32, the weight's shape, differentiable in α."""
        result: Tensor = _SoftRound.apply(self.alpha, self.floor, self.scale, self.zero_point, self.highest)
        return result

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the weight with h(α) rounded, 1 where α ≥ 0 and 0 elsewhere: float32, the weight's shape."""
        codes = (self.floor + (self.alpha >= 0)).clamp_(0, self.highest)
        return codes.sub_(self.zero_point).mul_(self.scale)

    def regularizer(self, beta: float) -> Tensor:
        """Return Σ (1 - |2h(α) - 1|^β), a float32 scalar that is 0 where every h(α) is 0 or 1.

        Args:
            beta: exponent β; the larger it is, the flatter the term around h(α) = 1/2.
        """
        result: Tensor = _Regularizer.apply(self.alpha, beta)
        return result


def _rectified_sigmoid(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return h(α) and its derivative, both of α's shape."""
    sigmoid = alpha.sigmoid()
    unlimited = sigmoid * _STRETCH + _OFFSET
    h = unlimited.clamp(0, 1)
    return h, (sigmoid * (1 - sigmoid)).mul_(_STRETCH).mul_(unlimited == h)


# Gradients by hand take half the passes over memory that autograd's recorded ones take.
class _SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, floor: Tensor, scale: Tensor, zero_point: Tensor, highest: int) -> Tensor:
        h, derivative = _rectified_sigmoid(alpha)
        unlimited = h.add_(floor)
        codes = unlimited.clamp(0, highest)
        ctx.save_for_backward(derivative.mul_(unlimited == codes).mul_(scale))
        return codes.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (derivative,) = ctx.saved_tensors
        return gradients[0] * derivative, None, None, None, None


class _Regularizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, beta: float) -> Tensor:
        h, derivative = _rectified_sigmoid(alpha)
        signed = h.mul_(2).sub_(1)
        power = signed.abs().pow_(beta - 1)
        ctx.save_for_backward(derivative.mul_(power).mul_(signed.sign()).mul_(-2 * beta))
        return alpha.numel() - power.mul_(signed.abs_()).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return gradients[0] * derivative, None
