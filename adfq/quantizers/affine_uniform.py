"""Uniform quantization with a zero point that is any real number."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.parts import in_parts
from adfq.quantizers.base import rescale
from adfq.quantizers.uniform import UniformQuantizer
from adfq.statistics import Errors, MinMax, Search

ZEROS = ("middle", "shared")

_WIDTHS = (0.2, 0.3, 0.4, 0.52, 0.66, 0.82, 1.0)  # shares of the least step size that reaches all values
_FINER = (0.84, 0.92, 1.0, 1.08, 1.16)  # factors of the best of these
_ZEROS = tuple(step / 20 for step in range(1, 20))  # zero points as shares of the highest code


class AffineUniformQuantizer(UniformQuantizer):
    """Uniform quantizer with a real zero point: q = clamp(round(x/scale + zero_point), 0, 2^bits - 1).

    x̂ = scale·(q - zero_point). With zero_point = (2^bits - 1)/2 the levels lie symmetrically about 0, which is none of
    them. An integer matrix product needs no whole zero point: with one for all rows its part is a constant for each
    output channel. Step sizes have the least mean |x̂ - x|^exponent among shares of the range.

    Args:
        bits: bit-width, 2 to 8.
        granularity: values that share a scale, see `UniformQuantizer`.
        zero: zero point. ``"middle"``, the default: (2^bits - 1)/2. ``"shared"``: the one of 19 shares of the highest
            code that has the least error, one for all values.
        exponent: exponent of the error that step sizes make least, above 0; 2.5 by default. A higher one cuts off less.

    Attributes:
        scale: float32, as many dimensions as the calibration tensor; none for ``"tensor"``.
        zero_point: float32, the shape of `scale`.

    Raises:
        AdfqError: for an unknown zero point, and see `UniformQuantizer`.
    """

    def __init__(self, bits: int, granularity: str = "tensor", zero: str = "middle", exponent: float = 2.5) -> None:
        super().__init__(bits, granularity)
        if zero not in ZEROS:
            raise AdfqError(f"unknown zero point {zero!r}; there are {', '.join(ZEROS)}")
        self.zero, self.exponent = zero, exponent

    def _search(self) -> Search[None]:
        yield (extremes := MinMax())
        lowest, highest = extremes.lowest, extremes.highest
        zeros = _ZEROS if self.zero == "shared" else (0.5,)
        points = torch.tensor(zeros, device=lowest.device) * (self.levels - 1)
        full = torch.stack([self._least_scale(lowest, highest, point) for point in points])
        scales = (full[:, None] * lowest.new_tensor(_WIDTHS)[:, None]).flatten(0, 1)  # zero points × widths, G
        each = points.repeat_interleave(len(_WIDTHS))
        yield (errors := Errors([partial(self._try, *pair) for pair in zip(scales, each, strict=True)], self.exponent))
        least, best = errors.result().unflatten(0, (len(points), -1)).min(1)
        chosen = least.sum(1).argmin()
        scale, point = full[chosen] * lowest.new_tensor(_WIDTHS)[best[chosen]], points[chosen]
        finer = scale * lowest.new_tensor(_FINER)[:, None]
        yield (errors := Errors([partial(self._try, candidate, point) for candidate in finer], self.exponent))
        scale = finer.gather(0, errors.result().argmin(0, keepdim=True))[0]
        self._set(scale, point, torch.maximum(-lowest, highest))

    def _least_scale(self, lowest: Tensor, highest: Tensor, point: Tensor) -> Tensor:
        """Return the least step size of each group with which no value is cut off."""
        return torch.maximum(highest / (self.levels - 1 - point), -lowest / point).clamp(min=0)

    def _try(self, scale: Tensor, point: Tensor, part: Tensor, rows: slice) -> Tensor:
        return quantize_affinely(part, _positive(scale)[rows, None], point, self.levels)

    def _set(self, scale: Tensor, point: Tensor, largest: Tensor) -> None:
        empty = largest < torch.finfo(scale.dtype).tiny * self.levels
        self.scale = torch.where(empty, 1.0, _positive(scale)).reshape(self._shape)
        self.zero_point = torch.where(empty, point.round(), point).expand_as(scale).reshape(self._shape).clone()
        self._placeholder = empty.reshape(self._shape)

    def _quantize(self, x: Tensor) -> Tensor:
        self._check_positions(x)
        if not torch.is_grad_enabled():
            return quantize_affinely(x, self.scale, self.zero_point, self.levels)
        with torch.no_grad():
            ratio = x / self.scale
            unlimited = (ratio + self.zero_point).round_()
            codes = unlimited.clamp(0, self.levels - 1)
            inside = unlimited.eq_(codes)
        return rescale(x, self.scale, ratio, codes.sub_(self.zero_point), inside, self.straight_through)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of `x`: uint8, the shape of `x`.

        Args:
            x: values of any floating-point dtype.
        """
        return (x.float() / self.scale).add_(self.zero_point).round_().clamp_(0, self.levels - 1).to(torch.uint8)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"{super().describe()}, zero point {self.zero}"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"bits={self.bits}, granularity={self.granularity!r}, zero={self.zero!r}, exponent={self.exponent}"


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_affinely(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Round `x` to scale·(q - zero_point) with codes q from 0 to levels - 1, without gradient.

    Args:
        x: float32, any shape.
        scale: step size; broadcasts against `x`.
        zero_point: code of 0, any real number; broadcasts against `x`.
        levels: number of codes, 2^bits.
    """

    def quantize(part: Tensor, out: Tensor) -> None:
        torch.div(part, scale, out=out).add_(zero_point).round_().clamp_(0, levels - 1).sub_(zero_point).mul_(scale)

    if scale.dim() == 0 or (scale.dim() == x.dim() and len(scale) == 1):
        return in_parts(quantize, x)
    result = x.new_empty(torch.broadcast_shapes(x.shape, scale.shape))
    quantize(x, result)
    return result
