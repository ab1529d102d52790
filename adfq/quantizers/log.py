"""Logarithmic quantization of values that are never negative."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from adfq.errors import AdfqError
from adfq.quantizers.base import Quantizer, rescale
from adfq.ranges import PERCENTILES, in_parts, mean_errors, quantiles, thin_out


class LogQuantizer(Quantizer):
    """q = round(-log_base(x/scale)), x̂ = scale·base^-q; codes of 2^bits and above give 0.

    For post-softmax attention: steps are finest near 0, where the values are (RepQ-ViT and ADFQ-ViT, base √2).

    Args:
        bits: 2 to 8.
        base: ratio of neighbouring levels, above 1.

    Attributes:
        scale: float32 scalar, the largest value: of three high percentiles the one with the smallest mean
            squared error.

    Raises:
        AdfqError: for another base or bit-width, and on calibration with negative values.
    """

    def __init__(self, bits: int, base: float = 2**0.5) -> None:
        super().__init__(bits)
        if not 1 < base < math.inf:
            raise AdfqError(f"the base of a logarithmic quantizer must be above 1, got {base}")
        self.base = base

    def _find_range(self, x: Tensor) -> None:
        if x.min() < 0:
            raise AdfqError("a logarithmic quantizer takes no negative values")
        self.scale = self._find_scale(x)

    def _find_scale(self, x: Tensor) -> Tensor:
        x = thin_out(x.reshape(1, -1))
        candidates = quantiles(x, PERCENTILES, upper=True)[:, 0]
        # Percentiles of nearly empty tensors are 0: the largest value serves, or 1 where that is 0 as well.
        largest = x.max()
        candidates = torch.where(candidates > 0, candidates, largest if largest > 0 else torch.ones_like(largest))
        errors = mean_errors(x, [partial(self._try, scale) for scale in candidates])
        return candidates[errors[:, 0].argmin()]

    def _try(self, scale: Tensor, x: Tensor, _: slice) -> Tensor:
        return self._round(x, scale, torch.empty_like(x))

    def _quantize(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return in_parts(lambda part, out: self._round(part, self.scale, out), x)
        with torch.no_grad():
            ratio = x / self.scale
            limited = ratio.clamp(0, 1)
            values = self._to_levels(limited.clone())
        return rescale(x, self.scale, ratio, values, limited.eq_(ratio))

    def _round(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        return self._to_levels(torch.div(x, scale, out=out).clamp_(0, 1)).mul_(scale)

    def _to_levels(self, ratio: Tensor) -> Tensor:
        """Moves values in [0, 1] to the nearest level (in the logarithm), in place; log 0 is beyond every code."""
        steps_per_octave = 1 / math.log2(self.base)
        negative_codes = ratio.log2_().mul_(steps_per_octave).round_()
        return F.threshold(negative_codes, -self.levels, -math.inf, inplace=True).div_(steps_per_octave).exp2_()

    def describe(self) -> str:
        return f"logarithmic, {self.bits} bits, base {self.base:.4g}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base:.4g}"
