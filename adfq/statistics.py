"""Statistics of values that come in parts, such as the batches of a calibration.

A search for a quantizer's range is a generator: it yields a statistic, which wants all values, part by part, and goes
on with the next one or ends. So one search serves a tensor at hand, and any number of images in bounded memory.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.parts import rows_of_part

T = TypeVar("T")


class Statistic(ABC):
    """A statistic of G groups of values, a row each."""

    @abstractmethod
    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values.

        Args:
            values: G×n, without gradient; n may differ from part to part.
            share: this part's share of all values, above 0 and up to 1.

        Raises:
            AdfqError: for another number of groups than before.
        """


def _check_groups(values: Tensor, before: int) -> None:
    # Token positions, say, are groups whose number depends on the size of the image.
    if len(values) != before:
        raise AdfqError(f"cannot calibrate {before} ranges on an input with {len(values)}; give images of one size")


#: A generator of the statistics that it needs, one after the other, which returns what was looked for.
Search = Generator[Statistic, None, T]


def search_at_once(search: Search[T], values: Tensor) -> T:
    """Return the outcome of a search among values that are at hand.

    Args:
        search: a search that has not begun.
        values: G×n.
    """
    while True:
        try:
            statistic = next(search)
        except StopIteration as end:
            found: T = end.value
            return found
        statistic.update(values, 1.0)


class Everything(Statistic):
    """All values as they come, in memory.

    Attributes:
        parts: the parts so far, of any shape.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values, of any shape; see `Statistic.update`."""
        self.parts.append(values)


class MinMax(Statistic):
    """The smallest and the largest value of each group.

    Attributes:
        lowest: smallest values, G.
        highest: largest values, G.
        count: number of values of a group.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self) -> None:
        self.count = 0

    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values, see `Statistic.update`."""
        lowest, highest = torch.aminmax(values, dim=1)
        if self.count:
            _check_groups(values, len(self.lowest))
            lowest, highest = torch.minimum(self.lowest, lowest), torch.maximum(self.highest, highest)
        self.lowest, self.highest = lowest, highest
        self.count += values.shape[1]


class Quantiles(Statistic):
    """Quantiles of each group near one end, as torch.quantile computes them.

    Only the outermost values are kept. Their number follows from the first part's share; if other parts then hold more
    values than that, the quantiles are not `complete`, and another pass with the `count` is needed.

    Args:
        fractions: each between 0 and 1; the closer to the end, the cheaper.
        upper: True for fractions near 1, False for fractions near 0.
        count: number of values of a group, if it is known; 0, the default, if not.

    Attributes:
        count: number of values of a group so far.
    """

    def __init__(self, fractions: Sequence[float], upper: bool, count: int = 0) -> None:
        self.fractions, self.upper, self.count, self._expected = tuple(fractions), upper, 0, count
        self._kept: list[Tensor] = []
        self._size, self._limit = 0, None
        self._sure = math.inf

    _sure: float  # number of outermost values that are certainly among the kept ones
    _limit: Tensor | None  # a value that all quantiles lie beyond

    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values, see `Statistic.update`."""
        if self._kept:
            _check_groups(values, len(self._kept[0]))
        self.count += values.shape[1]
        self._expected = max(self._expected, self.count, math.ceil(values.shape[1] / share - 1e-6))
        needed = self._needed(self._expected)
        if self._limit is not None:
            values = values[values >= self._limit if self.upper else values <= self._limit][None]
        if not values.shape[1]:
            return
        if needed < values.shape[1]:
            self._sure = min(self._sure, needed)
        self._kept.append(outermost(values, min(needed, values.shape[1]), self.upper))
        self._size += self._kept[-1].shape[1]
        if self._size > 3 * needed or (self._limit is None and len(self._kept) > 1 and self._size >= needed):
            self._order(needed)

    def _order(self, size: int) -> Tensor:
        """Return the outermost of the kept values in order, and keep no others."""
        if len(self._kept) > 1:
            values = torch.cat(self._kept, 1)
            if size < values.shape[1]:
                self._sure = min(self._sure, size)
            self._kept = [values.topk(min(size, values.shape[1]), dim=1, largest=self.upper).values]
            self._size = self._kept[0].shape[1]
            if len(values) == 1 and self._size == size:  # rows of several groups would differ in length
                self._limit = self._kept[0][0, -1]
        return self._kept[0]

    @property
    def outermost(self) -> Tensor:
        """The largest value of each group, or the smallest: G."""
        return self._order(self._needed(self._expected))[:, 0]

    @property
    def complete(self) -> bool:
        """True if enough values were kept."""
        return self._sure >= self._needed(self.count)

    def result(self, transform: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
        """Return the quantiles, len(fractions)×G.

        Args:
            transform: increasing function to take quantiles of; the identity by default.
        """
        values = transform(self._order(self._needed(self.count)).T)
        below, above, weights = self._ranks(self.count, values.device)
        return torch.lerp(values[below], values[above], weights[:, None].to(values.dtype))

    def _needed(self, count: int) -> int:
        below, above, _ = self._ranks(count)
        return int(torch.maximum(below, above).max()) + 1

    def _ranks(self, count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return ranks, from the end, of the values around each quantile, and the weight of the second ones."""
        # torch.quantile has fractions in single precision and ranks in double. A scale that is off in its last digit
        # flips codes, and one flipped code moves everything after it.
        ranks = torch.tensor(self.fractions, dtype=torch.float32, device=device).double() * (count - 1)
        below, above = ranks.long(), ranks.ceil().long()
        weights = ranks - below
        if self.upper:
            below, above = count - 1 - below, count - 1 - above
        return below, above, weights


_BLOCK = 32  # greatest number of values in a block


def outermost(values: Tensor, count: int, largest: bool) -> Tensor:
    """Return the largest or smallest values of each row, the outermost first.

    Args:
        values: G×n.
        count: number of values wanted of each row.
        largest: True for the largest, False for the smallest.
    """
    block = min(_BLOCK, (values.shape[1] - 1) // (2 * count))
    if block > 1:
        # The values lie in the `count` blocks with the outermost extremes, so that few of the many are sorted.
        blocks = values.shape[1] // block
        body, rest = values.split((block * blocks, values.shape[1] - block * blocks), dim=1)
        body = body.unflatten(1, (block, blocks))
        ends = body.amax(1) if largest else body.amin(1)
        chosen = ends.topk(count, dim=1, largest=largest, sorted=False).indices
        values = torch.cat((body.gather(2, chosen[:, None].expand(-1, block, -1)).flatten(1), rest), dim=1)
    return values.topk(count, dim=1, largest=largest).values


class Errors(Statistic):
    """The quantization error mean |x - x̂|^exponent of each group, for each of some candidates.

    Args:
        candidates: functions of some columns (rows×columns) and the slice of their rows; each returns the quantized
            values in a new tensor.
        exponent: exponent of the error; 2, the default, gives the mean squared error.
        prepare: function of a part of the values, whose result is quantized; the identity by default.
    """

    def __init__(
        self,
        candidates: Sequence[Callable[[Tensor, slice], Tensor]],
        exponent: float = 2.0,
        prepare: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.candidates, self.exponent, self.prepare = candidates, exponent, prepare
        self.sums, self.count = torch.zeros(()), 0

    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values, see `Statistic.update`."""
        values = self.prepare(values)
        if self.count:
            _check_groups(values, self.sums.shape[1])
        errors = torch.zeros(len(self.candidates), len(values), dtype=torch.float64, device=values.device)
        columns = rows_of_part(values[0]) if len(values) else 1
        for start in range(0, len(values), step := rows_of_part(values)):
            rows = slice(start, start + step)
            for part in values[rows].split(columns, dim=1):
                for error, quantize in zip(errors, self.candidates, strict=True):
                    off = quantize(part, rows).sub_(part)
                    error[rows] += _powers(off, self.exponent).sum(1)
        self.sums = self.sums.to(errors.device) + errors
        self.count += values.shape[1]

    def result(self) -> Tensor:
        """Return the errors, len(candidates)×G, float64."""
        return self.sums / self.count


def _powers(x: Tensor, exponent: float) -> Tensor:
    """Return |x|^exponent in the place of x."""
    if exponent == 2:
        return x.square_()
    if exponent == 2.5:  # a sixth of the time of a general power
        return x.abs_().sqrt().mul_(x).mul_(x)
    return x.abs_().pow_(exponent)


_BINS = 2048
_HISTOGRAM_PART = 2**23  # values at once, which take five times their memory


class Histograms(Statistic):
    """A histogram of each group: the values themselves where these are no more than its bins.

    Args:
        extremes: smallest and largest value of each group, and the number of values.
    """

    def __init__(self, extremes: MinMax) -> None:
        self.extremes = extremes
        self.exact = extremes.count <= _BINS
        self._values: list[Tensor] = []
        # Double precision, since the extent may be 0 or next to it.
        self._widths = (extremes.highest - extremes.lowest).double().clamp(min=1e-300)
        shape = (2, 0 if self.exact else len(self._widths), _BINS)
        self._counts, self._sums = torch.zeros(shape, dtype=torch.float64, device=self._widths.device)

    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values, see `Statistic.update`."""
        if self.exact:
            self._values.append(values.clone())
            return
        for row, low, width, counts, sums in zip(
            values, self.extremes.lowest, self._widths, self._counts, self._sums, strict=True
        ):
            for part in row.split(_HISTOGRAM_PART):
                bins = ((part - low).double() * _BINS / width).long().clamp_(max=_BINS - 1)
                counts += torch.bincount(bins, minlength=_BINS)
                sums += torch.bincount(bins, weights=part.double(), minlength=_BINS)

    def result(self, row: int) -> tuple[Tensor, Tensor | None]:
        """Return a group's bin means and counts, or its values and None.

        Args:
            row: index of the group.
        """
        if self.exact:
            return torch.cat([values[row] for values in self._values]), None
        counts, dtype = self._counts[row], self.extremes.lowest.dtype
        filled = counts > 0
        return (self._sums[row][filled] / counts[filled]).to(dtype), counts[filled].to(dtype)
