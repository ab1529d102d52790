"""Searches for a quantizer's range: min-max, percentiles, mean error.

Values have one row for each group (the tensor, a channel, a patch …), and come in any number of parts
(`adfq.statistics`). A search returns one scale and one zero point for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adfq.parts import in_parts
from adfq.statistics import Errors, Histograms, MinMax, Quantiles, Search, Statistic, search_at_once

PERCENTILES = (0.999, 0.9999, 0.99999)
#: Percentiles of weights in I&S-ViT's released code, and in ERQ's.
PERCENTILES_9 = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)
PERCENTILES_10 = (*PERCENTILES_9, 1.0)


@dataclass(frozen=True)
class Found:
    """Outcome of a search.

    Attributes:
        scale: step sizes, G.
        zero_point: codes of 0, G.
        largest: largest absolute values, G.
    """

    scale: Tensor
    zero_point: Tensor
    largest: Tensor


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Round `x` to scale·(q - zero_point) with codes q from 0 to levels - 1, without gradient.

    Args:
        x: float32, any shape.
        scale: step size; broadcasts against `x`.
        zero_point: code of 0; broadcasts against `x`.
        levels: number of codes, 2^bits.
    """

    def quantize(part: Tensor, out: Tensor) -> None:
        torch.div(part, scale, out=out).round_().add_(zero_point).clamp_(0, levels - 1).sub_(zero_point).mul_(scale)

    if scale.dim() == 0 or (scale.dim() == x.dim() and len(scale) == 1):
        return in_parts(quantize, x)
    result = x.new_empty(torch.broadcast_shapes(x.shape, scale.shape))
    quantize(x, result)
    return result


def minmax_search(levels: int) -> Search[Found]:
    """Search for the smallest range that holds every value.

    Args:
        levels: number of codes, 2^bits.
    """
    yield (extremes := MinMax())
    lowest, highest = extremes.lowest, extremes.highest
    return Found(*range_between(lowest, highest, levels), torch.maximum(-lowest, highest))


def percentile_search(levels: int, percentiles: Sequence[float] = PERCENTILES) -> Search[Found]:
    """Search for the range between percentiles 1-p and p with the smallest mean squared error.

    The search is that of RepQ-ViT's released code. ADFQ-ViT uses it outside its matrix products.

    Args:
        levels: number of codes, 2^bits.
        percentiles: values of p, in ascending order; by default `PERCENTILES`, RepQ-ViT's.
    """
    ends = yield from ends_of(percentiles, [1 - p for p in percentiles])
    uppers, lowers = ends.upper.result(), ends.lower.result()
    empty = (lowers == 0) & (uppers == 0)
    if empty[-1].any():  # nearly empty rows: the extremes serve
        lowers[-1] = torch.where(empty[-1], ends.lower.outermost, lowers[-1])
        uppers[-1] = torch.where(empty[-1], ends.upper.outermost, uppers[-1])
        empty[-1] = False
    candidates = [range_between(lower, upper, levels) for lower, upper in zip(lowers, uppers, strict=True)]
    yield (statistic := Errors([partial(_quantize_rows, *candidate, levels) for candidate in candidates]))
    errors = statistic.result().masked_fill_(empty, torch.inf)  # the scale of an empty range comes from no data
    best = errors.argmin(0, keepdim=True)
    scales, zero_points = (torch.stack(parts).gather(0, best)[0] for parts in zip(*candidates, strict=True))
    return Found(scales, zero_points, torch.maximum(-ends.lower.outermost, ends.upper.outermost))


class Ends(Statistic):
    """Quantiles near both ends of each group.

    Args:
        uppers: fractions near 1.
        lowers: fractions near 0; 0 itself gives the smallest value.
        count: see `Quantiles`.

    Attributes:
        upper: quantiles near the upper end.
        lower: quantiles near the lower end.
    """

    def __init__(self, uppers: Sequence[float], lowers: Sequence[float], count: int = 0) -> None:
        self.upper = Quantiles(uppers, upper=True, count=count)
        self.lower = Quantiles(lowers, upper=False, count=count)

    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values, see `Statistic.update`."""
        values = values.contiguous()  # for several passes
        self.upper.update(values, share)
        self.lower.update(values, share)


def ends_of(uppers: Sequence[float], lowers: Sequence[float]) -> Search[Ends]:
    """Search for quantiles near both ends.

    Args:
        uppers: see `Ends`.
        lowers: see `Ends`.
    """
    yield (ends := Ends(uppers, lowers))
    if not (ends.upper.complete and ends.lower.complete):  # later parts were larger than the first ones
        yield (ends := Ends(uppers, lowers, ends.upper.count))
    return ends


def _quantize_rows(scales: Tensor, zero_points: Tensor, levels: int, part: Tensor, rows: slice) -> Tensor:
    return fake_quantize(part, scales[rows, None], zero_points[rows, None], levels)


def range_between(lower: Tensor, upper: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the ranges between bounds.

    Args:
        lower: any shape.
        upper: the shape of `lower`.
        levels: number of codes, 2^bits.
    """
    # A group of equal values has no extent: span it from 0, which represents it exactly.
    constant = upper <= lower
    lower = torch.where(constant, lower.clamp(max=0), lower)
    upper = torch.where(constant, upper.clamp(min=0), upper)
    scale = (upper - lower) / (levels - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-lower / scale).round()


_WIDTHS = 100  # candidate widths: 1/100 … 100/100 of the full range
_EXPONENT = 2.4
_COARSE = 16  # zero points tried first; all of them at 4 bits and below
_SHORTLIST = 8


def mse_search(levels: int) -> Search[Found]:
    """Search for the range with the smallest mean |x - x̂|^2.4 among 100 widths and all zero points.

    The search is ADFQ-ViT's for the operands of its matrix products. Ranges include 0; data on one side of 0 has its
    zero point at that end. Candidates are scored on a histogram, or on the values themselves where these are few. Zero
    points are searched coarse to fine, because a shift of a range of given width clips more on one side and less on the
    other. The shortlist is scored on the values.

    Args:
        levels: number of codes, 2^bits.
    """
    yield (extremes := MinMax())
    lowest, highest = extremes.lowest.clamp(max=0), extremes.highest.clamp(min=0)
    scale, zero_point = torch.ones_like(highest), torch.zeros_like(highest)
    live = (lowest != highest).nonzero()[:, 0].tolist()  # the others are all zero
    if live:
        yield (histograms := Histograms(extremes))
        shortlists = {row: _shortlist(lowest[row], highest[row], *histograms.result(row), levels) for row in live}
        if not histograms.exact:
            yield (scored := _RowErrors(shortlists, levels))
            shortlists = scored.best()
        for row, candidates in shortlists.items():
            scale[row], zero_point[row] = candidates[0]
    return Found(scale, zero_point, torch.maximum(-lowest, highest))


def _shortlist(lowest: Tensor, highest: Tensor, points: Tensor, weights: Tensor | None, levels: int) -> Tensor:
    """Return the best candidates (scale, zero point) of a group by its histogram, best first."""
    widths = torch.arange(1, _WIDTHS + 1, device=points.device, dtype=points.dtype) / _WIDTHS
    scales = (highest - lowest) * widths / (levels - 1)
    stride = max(1, levels // _COARSE)
    if lowest == 0:
        zero_points = scales.new_zeros(1)
    elif highest == 0:
        zero_points = scales.new_full((1,), levels - 1)
    else:
        zero_points = torch.arange(0, levels, stride, device=points.device, dtype=points.dtype)
    candidates = torch.cartesian_prod(scales, zero_points)
    candidates = _best(candidates, points, weights, levels)
    if stride > 1 and len(zero_points) > 1:
        offsets = torch.arange(1 - stride, stride, device=points.device, dtype=points.dtype)
        finer = candidates[:, None, :].repeat(1, len(offsets), 1)
        finer[:, :, 1] = (finer[:, :, 1] + offsets).clamp_(0, levels - 1)
        candidates = _best(finer.flatten(0, 1), points, weights, levels)
    return candidates


class _RowErrors(Statistic):
    """Errors of candidates that each group has its own of.

    Args:
        candidates: C×2 (scale, zero point) by group.
        levels: number of codes, 2^bits.
    """

    def __init__(self, candidates: Mapping[int, Tensor], levels: int) -> None:
        self.candidates = candidates
        self.errors = {
            row: Errors(
                [partial(_quantize_rows, scale, zero_point, levels) for scale, zero_point in pairs[..., None]],
                _EXPONENT,
            )
            for row, pairs in candidates.items()
        }

    def update(self, values: Tensor, share: float) -> None:
        """Take in a part of the values, see `Statistic.update`."""
        for row, errors in self.errors.items():
            errors.update(values[row, None], share)

    def best(self) -> dict[int, Tensor]:
        """Return the best candidate of each group, 1×2."""
        return {row: pairs[self.errors[row].result()[:, 0].argmin()][None] for row, pairs in self.candidates.items()}


def _best(candidates: Tensor, points: Tensor, weights: Tensor | None, levels: int) -> Tensor:
    """Return the best of C×2 candidates (scale, zero point), best first."""
    errors = _weighted_error(points, weights, candidates, levels)
    return candidates[errors.topk(min(_SHORTLIST, len(errors)), largest=False).indices]


def _weighted_error(points: Tensor, weights: Tensor | None, candidates: Tensor, levels: int) -> Tensor:
    scale, zero_point = candidates[:, :1], candidates[:, 1:]
    error = fake_quantize(points, scale, zero_point, levels).sub_(points).abs_().pow_(_EXPONENT)
    return error.mean(1) if weights is None else error @ weights / weights.sum()


RANGES: dict[str, Callable[[int], Search[Found]]] = {
    "minmax": minmax_search,
    "percentile": percentile_search,
    "percentile9": partial(percentile_search, percentiles=PERCENTILES_9),
    "percentile10": partial(percentile_search, percentiles=PERCENTILES_10),
    "mse": mse_search,
}


def find_range(name: str, values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Return scale (G) and zero point (G) that a search finds for values at hand.

    Args:
        name: one of `RANGES`.
        values: G×n.
        levels: number of codes, 2^bits.
    """
    found = search_at_once(RANGES[name](levels), values)
    return found.scale, found.zero_point
