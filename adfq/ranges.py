"""Searches for a quantizer's range: min-max, percentiles, mean error.

All searches take a matrix of values with one row for each group (the tensor, a channel, a patch …). They return one
scale and one zero point for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

PERCENTILES = (0.999, 0.9999, 0.99999)

Range = tuple[Tensor, Tensor]


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


_PART = 2**18


def in_parts(function: Callable[[Tensor, Tensor], object], x: Tensor) -> Tensor:
    """Return `function` of `x`, computed on a CPU for a few indices of the first dimension at a time.

    Quantization passes over its values several times. A part stays in the processor's cache meanwhile and needs no new
    memory.

    Args:
        function: takes a part of `x` and an output of its shape, and writes the result to the output; each index of the
            first dimension must be independent of the others. No gradient.
        x: any shape.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = _rows_of_part(x)
    if rows >= len(x):
        function(x, result)
        return result
    for part, place in zip(x.split(rows), result.split(rows), strict=True):
        function(part, place)
    return result


def _rows_of_part(x: Tensor) -> int:
    whole = x.device.type != "cpu" or x.numel() <= _PART
    return max(1, len(x) if whole else _PART * len(x) // x.numel())


def mean_errors(
    values: Tensor, candidates: Sequence[Callable[[Tensor, slice], Tensor]], exponent: float = 2.0
) -> Tensor:
    """Return the quantization error mean |x - x̂|^exponent of each row, for each candidate.

    Args:
        values: G×n, without gradient.
        candidates: functions of some columns (rows×columns) and the slice of their rows; each returns the quantized
            values in a new tensor.
        exponent: exponent of the error; 2, the default, gives the mean squared error.

    Returns:
        Errors, len(candidates)×G, float64.
    """
    errors = torch.zeros(len(candidates), len(values), dtype=torch.float64, device=values.device)
    columns = _rows_of_part(values[0]) if len(values) else 1
    for start in range(0, len(values), step := _rows_of_part(values)):
        rows = slice(start, start + step)
        for part in values[rows].split(columns, dim=1):
            for error, quantize in zip(errors, candidates, strict=True):
                off = quantize(part, rows).sub_(part)
                error[rows] += (off.square_() if exponent == 2 else off.abs_().pow_(exponent)).sum(1)
    return errors / values.shape[1]


def minmax_range(values: Tensor, levels: int) -> Range:
    """Return the smallest range that holds every value.

    Args:
        values: G×n.
        levels: number of codes, 2^bits.

    Returns:
        scale (G) and zero_point (G).
    """
    return _from_bounds(*torch.aminmax(values, dim=1), levels)


def percentile_range(values: Tensor, levels: int) -> Range:
    """Return the range between percentiles 1-p and p with the smallest mean squared error, p of `PERCENTILES`.

    The search is that of RepQ-ViT's released code. ADFQ-ViT uses it outside its matrix products.

    Args:
        values: G×n.
        levels: number of codes, 2^bits.

    Returns:
        scale (G) and zero_point (G).
    """
    values = values.contiguous()  # for several passes
    uppers = quantiles(values, PERCENTILES, upper=True)
    lowers = quantiles(values, tuple(1 - p for p in PERCENTILES), upper=False)
    empty = (lowers == 0) & (uppers == 0)
    if empty[-1].any():  # nearly empty rows: the extremes serve
        lowest, highest = torch.aminmax(values, dim=1)
        lowers[-1] = torch.where(empty[-1], lowest, lowers[-1])
        uppers[-1] = torch.where(empty[-1], highest, uppers[-1])
        empty[-1] = False
    candidates = [_from_bounds(lower, upper, levels) for lower, upper in zip(lowers, uppers, strict=True)]
    errors = mean_errors(values, [partial(_quantize_rows, *candidate, levels) for candidate in candidates])
    errors.masked_fill_(empty, torch.inf)  # the scale of an empty range comes from no data
    best = errors.argmin(0, keepdim=True)
    scales, zero_points = (torch.stack(parts).gather(0, best)[0] for parts in zip(*candidates, strict=True))
    return scales, zero_points


def _quantize_rows(scales: Tensor, zero_points: Tensor, levels: int, part: Tensor, rows: slice) -> Tensor:
    return fake_quantize(part, scales[rows, None], zero_points[rows, None], levels)


def quantiles(values: Tensor, fractions: tuple[float, ...], upper: bool) -> Tensor:
    """Return the quantiles of each row as torch.quantile computes them, for tensors of any size.

    One partial selection serves all rows and fractions.

    Args:
        values: G×n.
        fractions: each between 0 and 1; the closer to the end, the cheaper.
        upper: True for fractions near 1, False for fractions near 0.

    Returns:
        Quantiles, len(fractions)×G.
    """
    count = values.shape[1]
    # torch.quantile has fractions in single precision and ranks in double. A scale that is off in its last digit flips
    # codes, and one flipped code moves everything after it.
    ranks = torch.tensor(fractions, dtype=torch.float32, device=values.device).double() * (count - 1)
    below, above = ranks.long(), ranks.ceil().long()
    weights = (ranks - below)[:, None].to(values.dtype)
    if upper:
        below, above = count - 1 - below, count - 1 - above
    nearest = _extremes(values, int(torch.maximum(below, above).max()) + 1, upper).T
    return torch.lerp(nearest[below], nearest[above], weights)


_BLOCK = 32


def _extremes(values: Tensor, count: int, largest: bool) -> Tensor:
    """Return the `count` largest or smallest values of each row, the outermost first."""
    blocks = values.shape[1] // _BLOCK
    if count < blocks // 2:
        # The values lie in the `count` blocks with the outermost extremes, so that few of the many are sorted.
        body, rest = values.split((_BLOCK * blocks, values.shape[1] - _BLOCK * blocks), dim=1)
        body = body.unflatten(1, (_BLOCK, blocks))
        outermost = body.amax(1) if largest else body.amin(1)
        chosen = outermost.topk(count, dim=1, largest=largest, sorted=False).indices
        values = torch.cat((body.gather(2, chosen[:, None].expand(-1, _BLOCK, -1)).flatten(1), rest), dim=1)
    return values.topk(count, dim=1, largest=largest).values


def _from_bounds(lower: Tensor, upper: Tensor, levels: int) -> Range:
    # A group of equal values has no extent: span it from 0, which represents it exactly.
    constant = upper <= lower
    lower = torch.where(constant, lower.clamp(max=0), lower)
    upper = torch.where(constant, upper.clamp(min=0), upper)
    scale = (upper - lower) / (levels - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-lower / scale).round()


_WIDTHS = 100  # candidate widths: 1/100 … 100/100 of the full range
_EXPONENT = 2.4
_BINS = 2048
_COARSE = 16  # zero points tried first; all of them at 4 bits and below
_SHORTLIST = 8
_HISTOGRAM_PART = 2**23  # values at once, which take five times their memory


def mse_range(values: Tensor, levels: int) -> Range:
    """Return the range with the smallest mean |x - x̂|^2.4 among 100 widths and all zero points.

    The search is ADFQ-ViT's for the operands of its matrix products. Ranges include 0; data on one side of 0 has its
    zero point at that end. Candidates are scored on a histogram, or on the values themselves where these are few. Zero
    points are searched coarse to fine, because a shift of a range of given width clips more on one side and less on the
    other. The shortlist is scored on the values.

    Args:
        values: G×n.
        levels: number of codes, 2^bits.

    Returns:
        scale (G) and zero_point (G).
    """
    found = [_mse_range_of_row(row, levels) for row in values.contiguous()]
    return torch.stack([scale for scale, _ in found]), torch.stack([zero_point for _, zero_point in found])


def _mse_range_of_row(values: Tensor, levels: int) -> Range:
    lowest, highest = values.min().clamp(max=0), values.max().clamp(min=0)
    if lowest == highest:  # all zero
        return torch.ones_like(highest), torch.zeros_like(highest)
    points, weights = _histogram(values)
    widths = torch.arange(1, _WIDTHS + 1, device=values.device, dtype=values.dtype) / _WIDTHS
    scales = (highest - lowest) * widths / (levels - 1)

    stride = max(1, levels // _COARSE)
    if lowest == 0:
        zero_points = scales.new_zeros(1)
    elif highest == 0:
        zero_points = scales.new_full((1,), levels - 1)
    else:
        zero_points = torch.arange(0, levels, stride, device=values.device, dtype=values.dtype)
    candidates = torch.cartesian_prod(scales, zero_points)
    candidates = _best(candidates, points, weights, levels)
    if stride > 1 and len(zero_points) > 1:
        offsets = torch.arange(1 - stride, stride, device=values.device, dtype=values.dtype)
        finer = candidates[:, None, :].repeat(1, len(offsets), 1)
        finer[:, :, 1] = (finer[:, :, 1] + offsets).clamp_(0, levels - 1)
        candidates = _best(finer.flatten(0, 1), points, weights, levels)
    if len(points) < len(values):
        quantize = [partial(_quantize_rows, scale, zero_point, levels) for scale, zero_point in candidates[..., None]]
        candidates = candidates[mean_errors(values[None], quantize, _EXPONENT)[:, 0].argmin()][None]
    return candidates[0, 0], candidates[0, 1]


def _histogram(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return bin means and counts, or the values themselves and None where they are no more than bins."""
    if len(values) <= _BINS:
        return values, None
    low, high = torch.aminmax(values)
    # Double precision, since the extent may be 0 or next to it.
    width = (high - low).double().clamp(min=1e-300)
    counts, sums = torch.zeros(2, _BINS, dtype=torch.float64, device=values.device)
    for part in values.split(_HISTOGRAM_PART):
        bins = ((part - low).double() * _BINS / width).long().clamp_(max=_BINS - 1)
        counts += torch.bincount(bins, minlength=_BINS)
        sums += torch.bincount(bins, weights=part.double(), minlength=_BINS)
    filled = counts > 0
    return (sums[filled] / counts[filled]).to(values.dtype), counts[filled].to(values.dtype)


def _best(candidates: Tensor, points: Tensor, weights: Tensor | None, levels: int) -> Tensor:
    """Return the best of C×2 candidates (scale, zero point), best first."""
    errors = _weighted_error(points, weights, candidates, levels)
    return candidates[errors.topk(min(_SHORTLIST, len(errors)), largest=False).indices]


def _weighted_error(points: Tensor, weights: Tensor | None, candidates: Tensor, levels: int) -> Tensor:
    scale, zero_point = candidates[:, :1], candidates[:, 1:]
    error = fake_quantize(points, scale, zero_point, levels).sub_(points).abs_().pow_(_EXPONENT)
    return error.mean(1) if weights is None else error @ weights / weights.sum()


RANGES: dict[str, Callable[[Tensor, int], Range]] = {
    "minmax": minmax_range,
    "percentile": percentile_range,
    "mse": mse_range,
}
