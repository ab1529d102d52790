"""ERQ's uniform weight quantizer with a second grid for outlier columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.quantizers.base import Quantizer
from adfq.quantizers.uniform import quantize_uniformly
from adfq.ranges import find_range

_QUANTILE = 0.99  # taken of a row's positive values, and mirrored of its negative ones
_PART = 1024  # rows at once: torch.quantile takes no more than 2^24 values


def outlier_columns(weight: Tensor, count: int) -> Tensor:
    """Return indices of the columns that the most rows flag as outliers, the most flagged first: at most `count`.

    A row flags its columns above the 99th percentile of its positive values and below the 1st percentile of its
    negative values. Columns flagged as often come in the order of the first row that flags them.

    Args:
        weight: m×n, float32.
        count: number of columns wanted.
    """
    flagged = torch.cat([_flag(part) for part in weight.split(_PART)])
    counts, first = flagged.sum(0), flagged.int().argmax(0)
    order = first.argsort(stable=True)
    order = order[counts[order].argsort(stable=True, descending=True)]
    return order[counts[order] > 0][:count]


def _flag(rows: Tensor) -> Tensor:
    def of_sign(mask: Tensor, quantile: float) -> Tensor:
        # A row without such values has NaN there, and flags none.
        return rows.where(mask, torch.nan).nanquantile(quantile, dim=1, keepdim=True)

    return (rows > of_sign(rows > 0, _QUANTILE)) | (rows < of_sign(rows < 0, 1 - _QUANTILE))


class DualUniformQuantizer(Quantizer):
    """Uniform quantizer of a weight with two grids for each output channel: of outlier columns, and of the others.

    Scale reparameterization multiplies a weight's input channels by factors. A channel with a large factor is large in
    every output channel. Ranges are found by the search ``"percentile10"``.

    Args:
        bits: bit-width, 2 to 8.
        outlier_share: number of outlier columns as a share of the number of output channels, rounded down; 0.05 by
            default, as in the released code. There are fewer where rows flag fewer (`outlier_columns`).

    Attributes:
        scale: float32, m×2: step size of the ordinary columns and of the outlier columns.
        zero_point: float32, m×2; a whole number.
        is_outlier: bool, n: True for outlier columns.

    Raises:
        AdfqError: for a share outside [0, 1], another bit-width, and in calibration for a tensor with less than two
            dimensions.
    """

    zero_point: Tensor
    is_outlier: Tensor

    def __init__(self, bits: int, outlier_share: float = 0.05) -> None:
        super().__init__(bits)
        if not (isinstance(outlier_share, (int, float)) and 0 <= outlier_share <= 1):
            raise AdfqError(f"outlier_share must be from 0 to 1, got {outlier_share!r}")
        self.outlier_share = outlier_share
        self.register_buffer("zero_point", torch.empty(0))
        self.register_buffer("is_outlier", torch.empty(0, dtype=torch.bool))

    def _find_range(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise AdfqError(f"a weight has an output and an input channel at least, got shape {tuple(x.shape)}")
        weight = x.flatten(1)
        count = min(math.floor(self.outlier_share * len(weight) + 1e-9), weight.shape[1] - 1)
        self.is_outlier = torch.zeros(weight.shape[1], dtype=torch.bool, device=x.device)
        self.is_outlier[outlier_columns(weight, count)] = True
        masks = (~self.is_outlier, self.is_outlier if self.is_outlier.any() else ~self.is_outlier)
        found = [find_range("percentile10", weight[:, mask], self.levels) for mask in masks]
        self.scale, self.zero_point = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))

    def grids(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each value: m×n."""
        ordinary, outlier = ((self.scale.view(-1, 2)[:, [k]], self.zero_point.view(-1, 2)[:, [k]]) for k in (0, 1))
        scale, zero_point = (torch.where(self.is_outlier, b, a) for a, b in zip(ordinary, outlier, strict=True))
        return scale, zero_point

    def _quantize(self, x: Tensor) -> Tensor:
        quantized = quantize_uniformly(x.flatten(1), *self.grids(), self.levels, self.straight_through)
        return quantized.reshape(x.shape)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of a weight: uint8, the shape of `x`.

        Args:
            x: the calibrated shape, any floating-point dtype.
        """
        scale, zero_point = self.grids()
        codes = (x.float().flatten(1) / scale).round_().add_(zero_point).clamp_(0, self.levels - 1)
        return codes.to(torch.uint8).reshape(x.shape)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes, bit for bit the result of `forward`: float32, the shape of `codes`.

        Args:
            codes: uint8, from `encode`.
        """
        scale, zero_point = self.grids()
        return codes.float().flatten(1).sub_(zero_point).mul_(scale).reshape(codes.shape)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"uniform, {self.bits} bits, per row, a second grid for {int(self.is_outlier.sum())} outlier columns"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"{super().extra_repr()}, outlier_share={self.outlier_share}"
