"""Rounding of a weight's columns one after the other, each error made up for by the later ones (arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adfq.calibration.grams import cholesky
from adfq.quantizers import UniformQuantizer

_BLOCK = 128  # columns whose errors reach the later ones together


@dataclass(frozen=True)
class Grid:
    """The grid of each output channel of a weight.

    Attributes:
        scale: step sizes, m.
        zero_point: codes of 0, m: whole numbers.
        levels: number of codes.
    """

    scale: Tensor
    zero_point: Tensor
    levels: int

    @classmethod
    def of(cls, quantizer: UniformQuantizer) -> Grid:
        """Return the grid of a calibrated quantizer with a scale for each output channel."""
        return cls(quantizer.scale.flatten(), quantizer.zero_point.flatten(), quantizer.levels)

    def encode(self, column: Tensor) -> Tensor:
        """Return the codes of a column of the weight, m."""
        # In single precision, so that without compensation these are the codes of the quantizer itself.
        return column.float().div_(self.scale).round_().add_(self.zero_point).clamp_(0, self.levels - 1)


class AffineGrid(Grid):
    """A grid whose zero points are any real numbers."""

    def encode(self, column: Tensor) -> Tensor:
        """Return the codes of a column of the weight, m."""
        return column.float().div_(self.scale).add_(self.zero_point).round_().clamp_(0, self.levels - 1)


def inverse_factor(matrix: Tensor) -> Tensor:
    """Return the upper triangular U with UᵀU = matrix⁻¹."""
    factor = cholesky(matrix.flip(0, 1), "damping").flip(0, 1)  # upper, factor·factorᵀ = matrix
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse


def compensated_codes(columns: Tensor, products: Tensor, grid: Grid) -> Tensor:
    """Return codes of a weight's columns, those of the largest inputs rounded first: n×m, double precision.

    Args:
        columns: the weight transposed, n×m, double precision.
        products: positive definite XᵀX, n×n.
        grid: grid of each output channel.
    """
    order = products.diagonal().argsort(descending=True)
    codes = torch.empty_like(columns)
    codes[order] = round_columns(columns[order], grid, inverse_factor(products[order][:, order]))
    return codes


def round_columns(columns: Tensor, grid: Grid, inverse: Tensor, correction: Tensor | None = None) -> Tensor:
    """Return codes of a weight's columns, rounded one after the other: n×m, double precision.

    Args:
        columns: the weight transposed, n×m, double precision; overwritten.
        grid: grid of each output channel.
        inverse: upper Cholesky factor of the inverse of XᵀX, n×n.
        correction: GPTAQ's P, strictly upper triangular, n×n; None, the default, for none.
    """
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), _BLOCK):
        block = slice(start, start + _BLOCK)
        rest = slice(start + _BLOCK, None)
        errors, weights = torch.empty_like(columns[block]), torch.empty_like(columns[block])
        for index, (within, shares) in enumerate(zip(columns[block], inverse[block, block], strict=True)):
            code = grid.encode(within)
            codes[start + index] = code
            weights[index] = within
            errors[index] = (within - (code - grid.zero_point) * grid.scale) / shares[index]
            later = columns[block][index + 1 :]
            later.addr_(shares[index + 1 :], errors[index], alpha=-1)
            if correction is not None:
                later.addr_(correction[start + index, block][index + 1 :], weights[index])
        columns[rest] -= inverse[block, rest].T @ errors
        if correction is not None:
            columns[rest] += correction[block, rest].T @ weights
    return codes
