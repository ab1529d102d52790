"""ERQ's two regressions: of a layer's weight on quantized inputs, and of the part of it that is not rounded yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adfq.calibration.grams import Gram, cholesky
from adfq.layers import QuantWeightLayer
from adfq.quantizers import DualUniformQuantizer, UniformQuantizer

_ROUNDS = 100  # greatest number in the rounding refinement


def values_of(layer: QuantWeightLayer) -> Tensor:
    """Return a layer's weight with its bias, if it has one, as last column: m×n or m×(n+1), double precision.

    Args:
        layer: linear layer or convolution.
    """
    weight = layer.weight.detach().flatten(1).double()
    return weight if layer.bias is None else torch.cat((weight, layer.bias.detach().double()[:, None]), dim=1)


def with_ones(gram: Gram, bias: bool) -> tuple[Tensor, Tensor]:
    """Return AᵀA and Aᵀ(A' - A) of inputs with a column of ones: A = [X̂, 1], A' = [X, 1].

    Args:
        gram: sums with differences.
        bias: False for no column of ones.
    """
    assert gram.differences is not None
    assert gram.difference_sums is not None
    if not bias:
        return gram.products, gram.differences
    size = len(gram.sums) + 1
    products, differences = gram.products.new_zeros(2, size, size)
    products[:-1, :-1], products[:-1, -1], products[-1, :-1] = gram.products, gram.sums, gram.sums
    products[-1, -1] = gram.rows
    differences[:-1, :-1], differences[-1, :-1] = gram.differences, gram.difference_sums
    return products, differences


def correct_activation_error(values: Tensor, products: Tensor, differences: Tensor, penalty: float) -> Tensor:
    """Return a layer's weight and bias, moved so that quantized inputs give the outputs of full precision (Aqer).

    V + Δ with (AᵀA + λI) Δᵀ = AᵀR, R = (A' - A) Vᵀ the outputs' error: the ridge regression of it.

    Args:
        values: V, weight and bias, m×k.
        products: AᵀA, k×k.
        differences: Aᵀ(A' - A), k×k.
        penalty: λ, above 0.

    Raises:
        AdfqError: for a penalty too small to invert AᵀA + λI.
    """
    return values + _solve(products, differences @ values.T, penalty).T


def _solve(matrix: Tensor, right: Tensor, penalty: float) -> Tensor:
    """Return the solution of (matrix + penalty·I) x = right."""
    ridge = matrix.clone()
    ridge.diagonal().add_(penalty)
    return torch.cholesky_solve(right, cholesky(ridge, "coe"))


@dataclass(frozen=True)
class Grid:
    """The grid of each value of a weight, m×n.

    Attributes:
        scale: step sizes, which broadcast to m×n.
        zero_point: codes of 0, the shape of `scale`.
        highest: highest code.
    """

    scale: Tensor
    zero_point: Tensor
    highest: int

    @classmethod
    def of(cls, quantizer: UniformQuantizer | DualUniformQuantizer, columns: int) -> Grid:
        """Return the grid of a calibrated quantizer.

        Args:
            quantizer: quantizer with a scale for each output channel, or two.
            columns: n.
        """
        if isinstance(quantizer, DualUniformQuantizer):
            return cls(*quantizer.grids(), quantizer.levels - 1)
        scale, zero_point = (
            parameter.flatten()[:, None].expand(-1, columns) for parameter in (quantizer.scale, quantizer.zero_point)
        )
        return cls(scale, zero_point, quantizer.levels - 1)

    def round(self, values: Tensor, columns: slice, rounding: str = "round") -> Tensor:
        """Return values on the grid, m×k, double precision.

        Args:
            values: m×k.
            columns: their columns in the weight.
            rounding: ``"round"``, the default, to nearest, ``"floor"`` or ``"ceil"``.
        """
        scale, zero_point = self.scale[:, columns].double(), self.zero_point[:, columns].double()
        codes: Tensor = getattr(torch, rounding)(values / scale).add_(zero_point).clamp_(0, self.highest)
        return codes.sub_(zero_point).mul_(scale)


def correct_weight_error(
    values: Tensor, grid: Grid, products: Tensor, penalty: float, moments: Tensor | None
) -> Tensor:
    """Return a layer's weight, rounded half by half so that the other half makes up for it, and bias (Wqer).

    Args:
        values: weight and bias, m×n or m×(n+1).
        grid: grid of the weight, m×n.
        products: AᵀA, in the columns of `values`.
        penalty: λ, above 0.
        moments: mean of the outer product of an input with itself, n×n (`second_moments`): roundings are refined for a
            small error under it. None for roundings to nearest.

    Raises:
        AdfqError: for a penalty too small to invert AᵀA + λI.
    """
    values, start, columns = values.clone(), 0, values.shape[1]
    weights = grid.scale.shape[1]
    while start < weights:
        # The bias, if any, is the last to remain.
        now = slice(start, start + max(1, (columns - start) // 2))
        start, rest = now.stop, slice(now.stop, None)
        error = grid.round(values[:, now], now) - values[:, now]
        if moments is not None:
            lower, upper = (grid.round(values[:, now], now, side) - values[:, now] for side in ("floor", "ceil"))
            refine_rounding(error, lower, upper, moments[now, now])
        values[:, now] += error
        if start < columns:
            values[:, rest] -= _solve(products[rest, rest], products[rest, now] @ error.T, penalty).T
    return values


def second_moments(gram: Gram) -> Tensor:
    """Return μμᵀ + Σ of a layer's inputs, with the covariance Σ divided by N - 1: n×n.

    Args:
        gram: sums over N rows.
    """
    count = max(gram.rows, 1)
    mean = gram.sums / count
    outer = mean[:, None] * mean
    return (gram.products - count * outer) / max(count - 1, 1) + outer


def refine_rounding(error: Tensor, lower: Tensor, upper: Tensor, moments: Tensor) -> None:
    """Set rounding errors e, in place, so that e M eᵀ of each row gets smaller, by one value a row and round.

    The value is the one with the largest gradient among those whose error the gradient points away from. It becomes the
    neighbour that a step down the gradient is nearer to. A row ends with the first step that changes nothing: later
    ones would be the same.

    Args:
        error: e, m×k: rounded minus unrounded values.
        lower: error of the neighbour below, m×k.
        upper: error of the neighbour above, m×k.
        moments: M, k×k, symmetric.
    """
    rows = torch.arange(len(error), device=error.device)
    products = error @ moments
    for _ in range(_ROUNDS):
        gradient = 2 * products[rows]
        gradient[gradient * error[rows] <= 0] = 0
        index = gradient.abs().argmax(1)
        at = rows, index
        old = error[at]
        target = old - gradient.gather(1, index[:, None])[:, 0]
        above, below = upper[at], lower[at]
        new = torch.where((target - above).abs() <= (target - below).abs(), above, below)
        change = new - old
        growth = change * (2 * products[at] + change * moments.diagonal()[index])
        kept = (change != 0) & (growth <= 0)
        if not kept.any():
            return
        rows, index, change = rows[kept], index[kept], change[kept]
        error[rows, index] = new[kept]
        products[rows] += change[:, None] * moments[index]
