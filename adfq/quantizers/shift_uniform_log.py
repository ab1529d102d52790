"""I&S-ViT's shift-uniform-log2 quantizer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.parts import in_parts
from adfq.quantizers.base import Quantizer, straight_through
from adfq.statistics import Errors, MinMax, Search

#: Shifts η that the search tries.
SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)

_SMALLEST = 2.0**-126


class ShiftUniformLogQuantizer(Quantizer):
    """Uniform quantizer of log2(x + η) with whole exponents: x̂ = 2^round(scale·q + log_min) - η.

    For post-softmax attention (I&S-ViT, section "shift-uniform-log2 quantizer"). Exponents are whole numbers, so that
    hardware needs a shift and a subtraction; more bits than the exponents need make it no finer.

    Args:
        bits: bit-width, 2 to 8.
        released: False, the default, for 2^bits codes on the grid that is searched. True for inference as in the
            released code, with 2^bits + 1 codes on a grid that is not the searched one.

    Attributes:
        scale: float32 scalar, step size of the logarithm.
        shift: float32 scalar, η: the one of `SHIFTS` with the smallest mean squared error.
        log_min: float32 scalar, the logarithm of code 0.

    Raises:
        AdfqError: for another bit-width, and in calibration for negative values.
    """

    shift: Tensor
    log_min: Tensor

    def __init__(self, bits: int, released: bool = False) -> None:
        super().__init__(bits)
        self.released = released
        self.register_buffer("shift", torch.empty(0))
        self.register_buffer("log_min", torch.empty(0))

    @property
    def highest(self) -> int:
        """The highest code."""
        return self.levels if self.released else self.levels - 1

    @property
    def log_max(self) -> Tensor:
        """The logarithm of the highest code: float32 scalar."""
        return self.log_min + self.scale * self.highest

    def _search(self) -> Search[None]:
        yield (extremes := MinMax())
        if extremes.lowest < 0:
            raise AdfqError("a shift-uniform-log2 quantizer takes no negative values")
        shifts = torch.tensor(SHIFTS, device=extremes.lowest.device)
        lowest, highest = ((end[0] + shifts).log2() for end in (extremes.lowest, extremes.highest))
        steps = _step(lowest, highest, self.levels - 1)
        yield (errors := Errors([partial(self._try, *grid) for grid in zip(shifts, lowest, steps, strict=True)]))
        best = errors.result()[:, 0].argmin()
        self.shift, self.log_min = shifts[best], lowest[best]
        self.scale = _step(lowest[best], highest[best], self.highest)

    def _try(self, shift: Tensor, log_min: Tensor, scale: Tensor, x: Tensor, _: slice) -> Tensor:
        return _powers(x + shift, log_min, scale, self.levels - 1).sub_(shift)

    def _quantize(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return in_parts(self._round, x)
        with torch.no_grad():
            shifted = (x + self.shift).clamp_(min=_SMALLEST)
            unlimited = ((shifted.log2() - self.log_min) / self.scale).round_()
            inside = unlimited == unlimited.clamp(0, self.highest)
            powers = _powers(shifted.clone(), self.log_min, self.scale, self.highest)
            slope = powers / shifted if self.straight_through else torch.zeros_like(powers)
        # The gradient of x̂ through both roundings is x̂ + η over x + η.
        return straight_through(x * slope, powers - self.shift, inside)

    def _round(self, x: Tensor, out: Tensor) -> None:
        shifted = torch.add(x, self.shift, out=out).clamp_(min=_SMALLEST)
        _powers(shifted, self.log_min, self.scale, self.highest).sub_(self.shift)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"shift-uniform-log2, {self.bits} bits{', one code more' if self.released else ''}"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"{super().extra_repr()}, released={self.released}"


def _step(lowest: Tensor, highest: Tensor, codes: int) -> Tensor:
    """Return the step between logarithms; 1 where all values are equal."""
    step = (highest - lowest) / codes
    return torch.where(step > 0, step, torch.ones_like(step))


def _powers(shifted: Tensor, log_min: Tensor, scale: Tensor, highest: int) -> Tensor:
    """Return the powers of two that shifted values become; overwrites these."""
    codes = shifted.log2_().sub_(log_min).div_(scale).round_().clamp_(0, highest)
    return codes.mul_(scale).add_(log_min).round_().exp2_()
