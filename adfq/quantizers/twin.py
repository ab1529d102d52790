"""PTQ4ViT's twin uniform quantizers: two uniform grids for two parts of the values."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.parts import in_parts
from adfq.quantizers.base import Quantizer, straight_through
from adfq.statistics import Errors, MinMax, Search

SPLITS = tuple(2.0**-i for i in range(20))

#: Depth of GELU's negative lobe.
GELU_DEPTH = 0.16997124254703522

_WIDTHS = 100  # positive scales tried alone: 1/100 … 100/100 of the largest value


class _TwinQuantizer(Quantizer):
    """Base of quantizers with two grids; gradients pass where no grid cuts the values off."""

    def _quantize(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return in_parts(lambda part, out: self._round(part, self.scale, out), x)
        return straight_through(x, self._round(x.detach(), self.scale), self._inside(x))

    def _search_scale(self, scales: Tensor) -> Search[Tensor]:
        """Return the scale with the smallest mean squared error."""
        yield (errors := Errors([partial(self._try, scale) for scale in scales]))
        return scales[errors.result()[:, 0].argmin()]

    def _try(self, scale: Tensor, x: Tensor, _: slice) -> Tensor:
        return self._round(x, scale)

    @abstractmethod
    def _round(self, x: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the quantized values of `x` for a given scale, in `out` or a new tensor, without gradient."""

    @abstractmethod
    def _inside(self, x: Tensor) -> Tensor:
        """Return a mask of the values that no grid cuts off: bool, the shape of `x`."""


class TwinSoftmaxQuantizer(_TwinQuantizer):
    """Twin quantizer of post-softmax attention: a fine grid from 0 to a split point, a coarse grid to 1.

    Values up to the split are on the fine grid. Values above it are on the coarse grid and never below the split
    (PTQ4ViT, section "twin uniform quantization"). Each grid has 2^(bits-1) codes from 0. fine step = coarse
    step·split, so that splits that are powers of two give steps that differ by a power of two.

    Args:
        bits: bit-width, 2 to 8.
        released: False, the default, for the paper's formula. True for that of the released code: the sum of x.clamp(0,
            split) on the fine grid and x.clamp(split, 1) on the coarse one, in which every value above the split comes
            out too high by the split.

    Attributes:
        scale: float32 scalar, the fine step, split / (2^(bits-1) - 1). `calibrate` takes the split of `SPLITS` with the
            smallest mean squared error.

    Raises:
        AdfqError: for another bit-width, and in calibration for values outside [0, 1].
    """

    def __init__(self, bits: int, released: bool = False) -> None:
        super().__init__(bits)
        self.released = released

    @property
    def steps(self) -> int:
        """Number of steps of either grid."""
        return self.levels // 2 - 1

    @property
    def split(self) -> Tensor:
        """End of the fine grid, in the values' units: float32 scalar."""
        return self.scale * self.steps

    def _search(self) -> Search[None]:
        yield (extremes := MinMax())
        if extremes.lowest < 0 or extremes.highest > 1:
            raise AdfqError("a twin softmax quantizer takes values from 0 to 1")
        scales = torch.tensor(SPLITS, device=extremes.highest.device) / self.steps
        self.scale = yield from self._search_scale(scales)

    def _inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= 1)

    def _round(self, x: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        # In this order nothing leaves [0, steps]: rounding keeps the order, and the limits are whole numbers.
        split = scale * self.steps
        fine = (x / scale).clamp_(0, self.steps).round_().mul_(scale)
        coarse = torch.maximum(x, split).clamp_(max=1).mul_(self.steps).round_().div_(self.steps)
        if self.released:
            return torch.add(fine, coarse, out=out)
        return torch.where(x <= split, fine, torch.maximum(coarse, split, out=coarse), out=out)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"twin uniform for softmax, {self.bits} bits{', sum of both grids' if self.released else ''}"


class TwinGeluQuantizer(_TwinQuantizer):
    """Twin quantizer of post-GELU activations: a grid with fixed scale below zero, a calibrated one above.

    GELU's negative lobe has a known depth: its scale is 0.16997 / 2^(bits-1), its codes are -2^(bits-1) … 0. The
    positive codes 0 … 2^(bits-1) - 1 have a scale of their own (PTQ4ViT, section "twin uniform quantization").

    Args:
        bits: bit-width, 2 to 8.

    Attributes:
        scale: float32 scalar, the step above zero. `calibrate` takes the one of 100 with the smallest mean squared
            error.

    Raises:
        AdfqError: for another bit-width.
    """

    @property
    def negative_scale(self) -> float:
        """Step below zero, in the values' units."""
        return GELU_DEPTH / (self.levels // 2)

    def _groups(self, x: Tensor) -> Tensor:
        return super()._groups(x.clamp(min=0))

    def _search(self) -> Search[None]:
        yield (extremes := MinMax())
        largest = extremes.highest[0]
        if largest <= 0:  # any step serves a tensor without values above zero
            largest = torch.ones_like(largest)
        widths = torch.arange(1, _WIDTHS + 1, device=largest.device) / _WIDTHS
        self.scale = yield from self._search_scale(largest * widths / (self.levels // 2 - 1))

    def _inside(self, x: Tensor) -> Tensor:
        half = self.levels // 2
        return (x > -(half + 0.5) * self.negative_scale) & (x < (half - 0.5) * self.scale)

    def _round(self, x: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        half = self.levels // 2
        below = (x / self.negative_scale).round_().clamp_(-half, 0).mul_(self.negative_scale)
        return torch.div(x, scale, out=out).round_().clamp_(0, half - 1).mul_(scale).add_(below)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"twin uniform for GELU, {self.bits} bits"
