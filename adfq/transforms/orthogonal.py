"""Orthogonal matrices that spread outliers over all channels: randomized Hadamard matrices."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def hadamard(size: int) -> Tensor | None:
    """Return a Hadamard matrix: entries ±1, H·Hᵀ = size·I, double precision; None for a size without a construction.

    It is the smallest Paley matrix that fits (I or II, over a prime field), doubled by Sylvester's construction.

    Args:
        size: number of rows.
    """
    order = size & -size  # the largest power of two in it
    odd = size // order
    base = torch.ones(1, 1, dtype=torch.float64) if odd == 1 else None
    doublings = order.bit_length() - 1
    while base is None and doublings:
        odd, doublings = 2 * odd, doublings - 1
        base = _paley(odd)
    if base is None:
        return None
    for _ in range(doublings):
        base = torch.kron(base, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return base


def _paley(order: int) -> Tensor | None:
    """Return Paley's matrix of the first or second kind; None for an order without one over a prime field."""
    if order % 4:
        return None
    if _is_prime(prime := order - 1):  # 3 mod 4, as the order is a multiple of 4
        core = _bordered(prime, -1.0)
        return core + torch.eye(order, dtype=torch.float64)
    if _is_prime(prime := order // 2 - 1) and prime % 4 == 1:
        core = _bordered(prime, 1.0)
        outside = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, outside) + torch.kron(torch.eye(len(core), dtype=torch.float64), diagonal)
    return None


def _bordered(prime: int, sign: float) -> Tensor:
    """Return the Jacobsthal matrix with a border: 1 above, `sign` at the left."""
    squares = {number * number % prime for number in range(1, prime)}
    characters = [0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)]
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = torch.tensor(characters, dtype=torch.float64)[(index[:, None] - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def random_rotation(size: int) -> Tensor:
    """Return a random orthogonal matrix, size×size, double precision.

    It is D·H·D′/√size with random signs D and D′, or the orthogonal factor of a Gaussian matrix where there is no
    Hadamard matrix H. Signs on one side alone would leave a row or column with sums of a few large values.

    Args:
        size: number of rows.
    """
    matrix = hadamard(size)
    if matrix is None:
        orthogonal, triangular = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
        return torch.as_tensor(orthogonal * triangular.diagonal().sign())
    signs = torch.randint(2, (2, size)).double() * 2 - 1
    return signs[0, :, None] * matrix * signs[1] / math.sqrt(size)


def mean_keeping_rotation(size: int) -> Tensor:
    """Return a random orthogonal matrix R with R·1 = 1, size×size, double precision.

    It keeps the mean of a row, so that LayerNorm without its affine part commutes with it, over the channels of several
    tokens side by side too. It is `random_rotation` and the reflection that exchanges 1 and its image.

    Args:
        size: number of rows.
    """
    rotation = random_rotation(size)
    axis = 1 - rotation.sum(0)
    length = axis @ axis
    if length < 1e-12 * size:
        return rotation
    return rotation - 2 / float(length) * torch.outer(rotation @ axis, axis)
