"""ADFQ-ViT's shift-log2 quantizer."""

from __future__ import annotations

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.parts import in_parts
from adfq.quantizers.log import LogQuantizer
from adfq.ranges import PERCENTILES, ends_of
from adfq.statistics import Search

SHIFTS = ("dynamic", "static")
EPSILON = 1e-6


class ShiftLogQuantizer(LogQuantizer):
    """Logarithmic quantizer of x - min(x) + 1e-6, whose result is shifted back.

    For post-GELU activations: the dense negative lobe falls where the levels are dense (ADFQ-ViT, section "shift-log2
    quantizer"). The paper's abstract says base 2, the released code has √2.

    Args:
        bits: bit-width, 2 to 8.
        base: ratio of neighbouring levels: √2, the default, or 2.
        shift: ``"dynamic"``, the default, takes the minimum of the tensor at hand, as the released code does, so that a
            result can depend on the rest of the batch. ``"static"`` takes the minimum of the calibration; values below
            it become it.

    Attributes:
        scale: float32 scalar, the largest shifted level.
        minimum: float32 scalar, the calibration's minimum; with ``"static"`` only.

    Raises:
        AdfqError: for another shift, base or bit-width.
    """

    minimum: Tensor
    _lowest: Tensor  # the calibration's minimum, while calibration images come in batches

    def __init__(self, bits: int, base: float = 2**0.5, shift: str = "dynamic") -> None:
        super().__init__(bits, base)
        if shift not in SHIFTS:
            raise AdfqError(f"unknown shift {shift!r}; there are {', '.join(SHIFTS)}")
        self.shift = shift
        self.register_buffer("_lowest", torch.empty(0), persistent=False)
        if shift == "static":
            self.register_buffer("minimum", torch.empty(0))

    def _search(self) -> Search[None]:
        ends = yield from ends_of(PERCENTILES, (0.0,))
        minimum = ends.lower.outermost[0]
        self.scale = yield from self._search_scale(ends, lambda x: (x - minimum).add_(EPSILON))
        self._lowest = minimum
        if self.shift == "static":
            self.minimum = minimum

    def _quantize(self, x: Tensor) -> Tensor:
        if self.shift == "static":
            minimum = self.minimum
        elif self.pinned:
            minimum = self._lowest
        else:
            minimum = x.detach().min()

        if torch.is_grad_enabled():
            return super()._quantize((x - minimum).add_(EPSILON)).add_(minimum - EPSILON)

        def quantize(part: Tensor, out: Tensor) -> None:
            shifted = torch.sub(part, minimum, out=out).add_(EPSILON)
            self._round(shifted, self.scale, out).add_(minimum - EPSILON)

        return in_parts(quantize, x)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"{self.shift}ally shifted {super().describe()}"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"{super().extra_repr()}, shift={self.shift!r}"
