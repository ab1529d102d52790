"""Logarithmic quantization of values that are never negative."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from adfq.errors import AdfqError
from adfq.parts import in_parts
from adfq.quantizers.base import Quantizer, rescale
from adfq.ranges import PERCENTILES, Ends, ends_of
from adfq.statistics import Errors, Search

#: Levels of each base from one power of two to the next.
_LEVELS_OF_OCTAVE = {2.0: 1, 2**0.5: 2}

# float32's exponent bits, the size of its 23-bit mantissa, and a small number whose half is normal.
_EXPONENT = 0x7F800000
_ONE = 2**23
_SMALLEST = 2.0**-125
_ROOT = torch.tensor(2.0).sqrt().item()


class LogQuantizer(Quantizer):
    """Logarithmic quantizer: q = round(-log_base(x/scale)), x̂ = scale·base^-q, and 0 for q ≥ 2^bits.

    Steps are finest near 0, where the values of post-softmax attention are dense. RepQ-ViT and ADFQ-ViT use base √2.

    Args:
        bits: bit-width, 2 to 8.
        base: ratio of neighbouring levels: √2, the default, or 2.

    Attributes:
        scale: float32 scalar, the largest level: of three high percentiles the one with the smallest mean squared
            error.

    Raises:
        AdfqError: for another base or bit-width, and in calibration for negative values.
    """

    def __init__(self, bits: int, base: float = 2**0.5) -> None:
        super().__init__(bits)
        if base not in _LEVELS_OF_OCTAVE:
            raise AdfqError(f"the base of a logarithmic quantizer must be 2 or √2 (2**0.5), got {base}")
        self.base = base

    def _search(self) -> Search[None]:
        ends = yield from ends_of(PERCENTILES, (0.0,))
        if ends.lower.outermost < 0:
            raise AdfqError("a logarithmic quantizer takes no negative values")
        self.scale = yield from self._search_scale(ends)

    def _search_scale(self, ends: Ends, shift: Callable[[Tensor], Tensor] = lambda x: x) -> Search[Tensor]:
        """Return, of the high percentiles of shifted values, the scale with the smallest error."""
        candidates = ends.upper.result(shift)[:, 0]
        # Percentiles of nearly empty tensors are 0: the largest value serves, or 1 if that is 0 as well.
        largest = shift(ends.upper.outermost)[0]
        candidates = torch.where(candidates > 0, candidates, largest if largest > 0 else torch.ones_like(largest))
        yield (errors := Errors([partial(self._try, scale) for scale in candidates], prepare=shift))
        return candidates[errors.result()[:, 0].argmin()]

    def _try(self, scale: Tensor, x: Tensor, _: slice) -> Tensor:
        return self._round(x, scale, torch.empty_like(x))

    def _quantize(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return in_parts(lambda part, out: self._round(part, self.scale, out), x)
        with torch.no_grad():
            ratio = x / self.scale
            values = self._to_levels(ratio * 2)
            inside = ratio.clamp(0, 1).eq_(ratio)
        return rescale(x, self.scale, ratio, values, inside, self.straight_through)

    def _round(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        return self._to_levels(torch.div(x, scale / 2, out=out)).mul_(scale)

    def _to_levels(self, doubled: Tensor) -> Tensor:
        """Round x/scale to the nearest level in the logarithm; the highest level is 1.

        A logarithm and a power for each value would take longer than all else, and a float's bits hold both. A float
        without its mantissa is the power of two below it. The mantissa of the middle between two powers is subtracted
        first: a value below the middle borrows from the exponent, a value above it does not.

        Args:
            doubled: 2·x/scale, float32; overwritten. The factor 2 is there because a borrow halves the value. Values
                that are not finite stay so.
        """
        bits = doubled.clamp_(_SMALLEST, 2).view(torch.int32)
        steps = _LEVELS_OF_OCTAVE[self.base]
        middle, *second = [math.ceil(_ONE * (2 ** ((step + 0.5) / steps) - 1)) for step in range(steps)]
        lower = [(bits - higher).bitwise_and_(_EXPONENT).view(torch.float32) for higher in second]
        bits.sub_(middle).bitwise_and_(_EXPONENT)
        for power in lower:  # two different powers mean the level between them, √2 times the lower one
            torch.lerp(power, doubled, _ROOT - 1, out=doubled)
        # Values below the middle between the last code's level and the one after it become 0, zeros included.
        limit = max(self.base ** (0.5 - self.levels), _SMALLEST)
        return F.threshold(doubled, limit, 0.0, inplace=True)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"logarithmic, {self.bits} bits, base {self.base:.4g}"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"{super().extra_repr()}, base={self.base:.4g}"
