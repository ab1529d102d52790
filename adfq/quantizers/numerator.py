"""Uniform quantization of softmax's numerators, before they are divided by their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.quantizers.base import Quantizer, straight_through
from adfq.statistics import MinMax, Search

_TINY = torch.finfo(torch.float32).tiny


class NumeratorQuantizer(Quantizer):
    """Uniform quantizer of the numerators of a softmax: q = round((2^bits - 1)·p/h), h the largest p of the row.

    p/h is exp(score - largest score), which a softmax computes before it divides by the sum. The largest is 1, so the
    grid is the same for all rows and images: it needs no calibration images. p̂ = h·q/(2^bits - 1) + r/n, where n is the
    number of keys and r the difference of the row's sums before and behind the rounding. So p̂ adds up to what p does.
    In an integer product with values, h/(2^bits - 1) is the scale of a row, and r the factor of the values' mean.

    Args:
        bits: bit-width, 2 to 8.

    Attributes:
        scale: float32 scalar, 1/(2^bits - 1).

    Raises:
        AdfqError: for another bit-width, and in calibration for negative values.
    """

    def _search(self) -> Search[None]:
        yield (extremes := MinMax())
        if (extremes.lowest < 0).any():
            raise AdfqError("cannot quantize negative values as a softmax's numerators")
        self.scale = torch.ones_like(extremes.lowest[0]) / (self.levels - 1)

    def _quantize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            step = (x.amax(-1, keepdim=True) * self.scale).clamp_(min=_TINY)
            values = (x / step).round_().mul_(step)
            remainder = x.sum(-1, keepdim=True) - values.sum(-1, keepdim=True)
            values += remainder / x.shape[-1]
        if not torch.is_grad_enabled():
            return values
        return straight_through(x, values, torch.ones_like(x, dtype=torch.bool))
