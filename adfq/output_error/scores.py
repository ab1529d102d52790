"""Scores of quantized values: the squared error of themselves, or of a matrix product with another operand.

Values are E×H×n×C: n rows of C channels for each of H heads and E images or windows. For a layer with a weight, E and H
are 1. The groups are those of a shape that broadcasts against the values: 1×1×1×1 for one group, 1×1×n×1 for rows,
1×1×1×C for channels, 1×H×1×1 for heads.

A score is a function of the values quantized in K ways (E×H×K×n×C), which it overwrites. It returns the error of each
way and group (K×G).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Shape = Sequence[int]


class Score(Protocol):
    """A score of quantized values.

    Attributes:
        values: the values in full precision, E×H×n×C.
        shape: shape of the groups.
    """

    values: Tensor
    shape: Shape

    def __call__(self, quantized: Tensor) -> Tensor:
        """Return the error of each group, K×G.

        Args:
            quantized: E×H×K×n×C; overwritten.
        """


def groups_of(values: Tensor, shape: Shape) -> Tensor:
    """Return values as G×n, a row for each group.

    Args:
        values: E×H×n×C.
        shape: shape of the groups.
    """
    kept = [dimension for dimension, size in enumerate(shape) if size > 1]
    reduced = [dimension for dimension in range(values.dim()) if dimension not in kept]
    groups = 1
    for size in shape:
        groups *= size
    return values.permute(*kept, *reduced).reshape(groups, -1)


def _sum(values: Tensor, shape: Shape) -> Tensor:
    """Return the sums over groups of some shape, K×G from E×H×K×n×C."""
    reduced = [place for place, size in zip((0, 1, 3, 4), shape, strict=True) if size == 1]
    return values.sum(reduced, keepdim=True).movedim(2, 0).flatten(1)


def _sum_of_squares(values: Tensor, shape: Shape) -> Tensor:
    """Return the sums of squares over groups of some shape, K×G from E×H×K×n×C; values may be overwritten."""
    if shape[-1] > 1:
        return _sum(values.square_(), shape)
    # The norm takes one pass, and half the time of squares and their sum.
    return _sum(torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_(), shape)


class SelfScore:
    """The squared error of the values themselves.

    Args:
        values: E×H×n×C.
        shape: shape of the groups.
    """

    def __init__(self, values: Tensor, shape: Shape) -> None:
        self.values, self.shape = values, shape

    def __call__(self, quantized: Tensor) -> Tensor:
        """Return the error of each group, see `Score`."""
        return _sum_of_squares(quantized.sub_(self.values[:, :, None]), self.shape)


class OutputScore:
    """The squared error of values @ otherᵀ, up to a part that is the same for all quantized values.

    With the error e of a row x and the other operand o, quantized ô, the output's error is e·ôᵀ + x·(ô - o)ᵀ. Its
    square is e·A·eᵀ + 2·x·B·eᵀ and a constant, with A = ôᵀô and B = (ô - o)ᵀô. This takes one pass over the other
    operand's rows for all candidates; where they are few, their products with e are taken instead.

    Args:
        values: E×H×n×C.
        shape: shape of the groups, whose last size is 1.
        other: the other operand in full precision, E×H×m×C.
        other_quantized: the same, quantized.
    """

    def __init__(self, values: Tensor, shape: Shape, other: Tensor, other_quantized: Tensor) -> None:
        self.values, self.shape = values, shape
        off = other_quantized - other
        self.squared = other_quantized.shape[-2] <= values.shape[-1]
        if self.squared:
            self.factor = other_quantized.mT.contiguous()
            self.cross = values @ off.mT
        else:
            self.factor = other_quantized.mT @ other_quantized
            self.cross = 2 * (values @ (off.mT @ other_quantized))

    def __call__(self, quantized: Tensor) -> Tensor:
        """Return the error of each group, see `Score`."""
        error = quantized.sub_(self.values[:, :, None])
        output = _multiply(error, self.factor).add_(self.cross[:, :, None])
        return _sum_of_squares(output, self.shape) if self.squared else _sum(output.mul_(error), self.shape)


def _multiply(error: Tensor, factor: Tensor) -> Tensor:
    """Return the products E×H×K×n×m of E×H×K×n×C and E×H×C×m."""
    product = error.flatten(2, 3) @ factor
    return product.reshape(*error.shape[:4], product.shape[-1])


class LowRankScore:
    """An `OutputScore` whose A is of low rank but for its diagonal, which takes a fraction of the time.

    A is approximated from below (Nyström) by a matrix of low rank, and what is left of it by its diagonal. Errors of
    rounding are nearly independent of one another, so that the rest's other entries cancel.

    Args:
        score: the score to approximate; not `OutputScore.squared`.
        rank: rank of the approximation.
    """

    def __init__(self, score: OutputScore, rank: int) -> None:
        self.values, self.shape, self.cross = score.values, score.shape, score.cross
        factor, self.rest = low_rank(score.factor[0, 0], rank)
        self.factor = factor[None, None]

    def __call__(self, quantized: Tensor) -> Tensor:
        """Return the error of each group, see `Score`."""
        error = quantized.sub_(self.values[:, :, None])
        squares = _sum_of_squares(_multiply(error, self.factor), self.shape)
        return squares + _sum(torch.addcmul(self.cross[:, :, None], error, self.rest).mul_(error), self.shape)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return F (C×rank) and d (C, at least 0) with matrix ≈ F·Fᵀ + diag(d), whose diagonal is the matrix's own.

    Args:
        matrix: C×C, symmetric, without negative eigenvalues.
        rank: at most C.
    """
    matrix = matrix.double()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), rank, generator=generator, dtype=torch.double).to(matrix.device)
    basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix @ start).Q).Q
    product = matrix @ basis
    inner = basis.mT @ product
    inner.diagonal().add_(1e-9 * matrix.diagonal().sum() + torch.finfo(torch.float).tiny)
    factor = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), product.mT, upper=False).mT
    rest = (matrix.diagonal() - factor.square().sum(1)).clamp_(min=0)
    return factor.float(), rest.float()
