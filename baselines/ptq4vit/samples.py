"""Samples of constant size from a stream of any length, drawn by mass, without bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_FLOOR = 1e-15  # share of all mass that an item without any has, so that it can be drawn where there is nothing else


def energies(sizes: Tensor, gradient: Tensor) -> Tensor:
    """Return the two energies of each row of a layer's output.

    The squared error that a row can contribute is its squared gradient, times a part that is alike for all rows
    (rounding) plus a part that grows with its values (clipping).

    Args:
        sizes: squared norms of the input's rows, …×M.
        gradient: gradient at the output, …×M×N.

    Returns:
        Squared norms of the gradient's rows, and these times `sizes`, …×M×2 in float64.
    """
    largest = gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)  # small gradients' squares underflow
    squared = (gradient / largest).square_().sum(-1).double() * largest.double().square()
    return torch.stack([squared, squared * sizes.double()], -1)


def draw(mass: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Draw indices along the last dimension without replacement, in proportion to mass.

    Indices whose share of the mass is larger than a draw's are all drawn. There is one draw from each equal share of
    the others' mass. Draws from different shares are independent: at equal distances they could meet the same token
    of every image.

    Args:
        mass: …×N, above 0, float64.
        count: number of indices to draw; all, if there are no more.

    Returns:
        Indices in ascending order (…×min(N, count)), and the probability with which each was drawn, in that shape.
    """
    total = mass.shape[-1]
    if total <= count:
        return torch.arange(total, device=mass.device).expand(mass.shape), torch.ones_like(mass)
    certain = torch.zeros_like(mass, dtype=torch.bool)
    while True:
        left = count - certain.sum(-1, keepdim=True)
        share = mass.masked_fill(certain, 0).sum(-1, keepdim=True) / left
        found = certain | (mass >= share)
        if torch.equal(found, certain):
            break
        certain = found
    uncertain = (mass / share).masked_fill_(certain, 0)
    middle = uncertain.cumsum(-1) - uncertain / 2
    # Systematic sampling keeps every index's probability in any order; in this one, it is independent across shares.
    order = (middle.floor_() + torch.rand_like(mass)).masked_fill_(certain, -1).argsort(-1)
    probabilities = uncertain.masked_fill_(certain, 1)
    points = torch.rand_like(mass[..., :1]) + torch.arange(count, device=mass.device)
    places = torch.searchsorted(probabilities.gather(-1, order).cumsum(-1), points, right=True)
    indices = order.gather(-1, places.clamp_(max=total - 1)).sort(-1).values
    return indices, probabilities.gather(-1, indices)


class Sample:
    """Sample of a stream of items whose weighted sums estimate those over all items, without bias.

    Each batch of the stream and the sample before it are thinned together, in proportion to the mass that an item
    stands for, as in VarOpt (Cohen et al., "Efficient Stream Sampling for Variance-Optimal Estimation of Subset Sums",
    SIAM J. Comput. 2011). Items are drawn from all batches by mass, no matter in how many batches they come, and all
    are kept where there are no more than the size.

    An item's mass is the sum of its two energies (`energies`), in parts of their totals over the stream.

    Args:
        size: largest number of items.

    Attributes:
        weights: inverse of each item's probability, K in float64.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.weights = torch.empty(0)
        self._energies = torch.empty(0, 2)
        self._totals = torch.zeros(2)
        # Values of items stay in their place while others come and go; energies and weights are in the stream's order.
        self._places = torch.empty(0, dtype=torch.long)
        self._values: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.weights)

    def add(self, found: Tensor, take: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """Draw a new sample from the present one and a batch of items.

        Args:
            found: energies of the batch's items, N×2 in float64.
            take: function from indices of items (k) to their values: tensors with k rows, which it copies. Trailing
                dimensions may differ between batches; the shorter ones are filled with zeros.
        """
        kept = len(self)
        self._totals = self._totals.to(found) + found.sum(0)
        both = torch.cat([self._energies.to(found), found])
        weights = torch.cat([self.weights.to(found), found.new_ones(len(found))])
        chosen, probabilities = draw(weights * self.mass(both), self.size)
        self._energies, self.weights = both[chosen], weights[chosen] / probabilities
        self._replace(chosen[chosen < kept], take(chosen[chosen >= kept] - kept))

    def mass(self, found: Tensor) -> Tensor:
        """Return the mass of items from their energies.

        Args:
            found: …×2 in float64.
        """
        return (found / self._totals.clamp(min=torch.finfo(found.dtype).tiny)).sum(-1) + _FLOOR

    def thin(self, count: int) -> tuple[list[Tensor], Tensor]:
        """Return the values of a smaller sample of the same stream, and its weights (float64).

        Args:
            count: largest number of items.
        """
        chosen, probabilities = draw(self.weights * self.mass(self._energies), count)
        places = self._places[chosen]
        return [values[places] for values in self._values], self.weights[chosen] / probabilities

    def _replace(self, stay: Tensor, new: tuple[Tensor, ...]) -> None:
        """Put new items in the places of all items but some, and behind them where these places are too few.

        Args:
            stay: indices of the items that stay, in the stream's order.
            new: values of the new items.
        """
        if not self._values:
            self._values = [values[:0] for values in new]
        size, more = len(self._values[0]), len(new[0])
        stay = self._places.to(stay)[stay]
        free = torch.ones(max(size, len(stay) + more), dtype=torch.bool, device=stay.device)
        free[stay] = False
        places = free.nonzero()[:more, 0]
        self._places = torch.cat([stay, places])
        for index, values in enumerate(new):
            shape = tuple(map(max, self._values[index].shape[1:], values.shape[1:]))
            self._values[index] = _fill(self._values[index], (len(free), *shape))
            self._values[index][places] = _fill(values, (more, *shape))


def _fill(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor with zeros behind its values in every dimension, up to a shape."""
    missing = [wanted - present for wanted, present in zip(shape, values.shape, strict=True)]
    if not any(missing):
        return values
    return F.pad(values, [pad for count in reversed(missing) for pad in (0, count)])
