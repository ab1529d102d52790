"""How a quantizer's range is found: min-max, percentile search, MSE search.

All searches work on a matrix of values, one row per group (the whole tensor, a channel, a patch …), and give
one scale and zero point per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

PERCENTILES = (0.999, 0.9999, 0.99999)

Range = tuple[Tensor, Tensor]


_MOST_VALUES = 2**23


def thin_out(values: Tensor) -> Tensor:
    """Every n-th value of each row (G×n), so that a search looks at no more of them than it can hold in memory.

    Above 8 million values percentiles and mean errors hardly change any more.
    """
    stride = -(-values.shape[1] // _MOST_VALUES)
    # An odd one does not keep meeting the same columns of an image. Next to each other, since searches pass over them
    # many times.
    return (values if stride == 1 else values[:, :: stride | 1]).contiguous()


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Rounds `x` to scale·(q - zero_point) with q in 0 … levels-1; no gradient. Arguments broadcast."""

    def quantize(part: Tensor, out: Tensor) -> None:
        torch.div(part, scale, out=out).round_().add_(zero_point).clamp_(0, levels - 1).sub_(zero_point).mul_(scale)

    if scale.dim() == 0 or (scale.dim() == x.dim() and len(scale) == 1):
        return in_parts(quantize, x)
    result = x.new_empty(torch.broadcast_shapes(x.shape, scale.shape))
    quantize(x, result)
    return result


_PART = 2**18


def in_parts(function: Callable[[Tensor, Tensor], object], x: Tensor) -> Tensor:
    """`function` of `x`; on a CPU, of a few indices of the first dimension at a time.

    Quantizing passes over its values again and again; a few of them stay in the processor's cache meanwhile, and need
    no new memory.

    Args:
        function: of each index by itself; writes its result, which has the shape of its first argument, to its second.
            No gradient.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = _rows_of_part(x)
    for part, place in zip(x.split(rows), result.split(rows), strict=True):
        function(part, place)
    return result


def _rows_of_part(x: Tensor) -> int:
    whole = x.device.type != "cpu" or x.numel() <= _PART
    return max(1, len(x) if whole else _PART * len(x) // x.numel())


def mean_errors(
    values: Tensor, candidates: Sequence[Callable[[Tensor, slice], Tensor]], exponent: float = 2.0
) -> Tensor:
    """How far quantized values are off: mean |x - x̂|^exponent of each row, for each candidate.

    Args:
        values: G×n; no gradient.
        candidates: each quantizes some columns of the rows in a slice, to a new tensor.

    Returns:
        len(candidates)×G, float64.
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
    """The smallest range that holds every value.

    Args:
        values: G×n.
        levels: number of codes, 2^bits.

    Returns:
        scale (G) and zero_point (G).
    """
    return _from_bounds(*torch.aminmax(values, dim=1), levels)


def percentile_range(values: Tensor, levels: int) -> Range:
    """The range between the percentiles p and 1-p, p of `PERCENTILES`, with the smallest mean squared error.

    RepQ-ViT's search (released code), used by ADFQ-ViT outside its matrix products. Arguments and results as in
    `minmax_range`.
    """
    values = thin_out(values)
    uppers = quantiles(values, PERCENTILES, upper=True)
    lowers = quantiles(values, tuple(1 - p for p in PERCENTILES), upper=False)
    candidates = [_from_bounds(lower, upper, levels) for lower, upper in zip(lowers, uppers, strict=True)]
    errors = mean_errors(values, [partial(_quantize_rows, *candidate, levels) for candidate in candidates])
    best = errors.argmin(0, keepdim=True)
    scales, zero_points = (torch.stack(parts).gather(0, best)[0] for parts in zip(*candidates, strict=True))
    return scales, zero_points


def _quantize_rows(scales: Tensor, zero_points: Tensor, levels: int, part: Tensor, rows: slice) -> Tensor:
    return fake_quantize(part, scales[rows, None], zero_points[rows, None], levels)


def quantiles(values: Tensor, fractions: tuple[float, ...], upper: bool) -> Tensor:
    """What torch.quantile gives, for tensors of any size: one partial selection serves all rows and fractions.

    Args:
        values: G×n.
        fractions: each between 0 and 1; the closer to the end, the cheaper.
        upper: whether the fractions lie near 1, or near 0.

    Returns:
        len(fractions)×G.
    """
    count = values.shape[1]
    # Fractions in single precision, ranks in double, as torch.quantile has them: a scale that is off in its last digit
    # flips codes, and one flipped code moves everything after it.
    ranks = torch.tensor(fractions, dtype=torch.float32, device=values.device).double() * (count - 1)
    below, above = ranks.long(), ranks.ceil().long()
    weights = (ranks - below)[:, None].to(values.dtype)
    if upper:
        below, above = count - 1 - below, count - 1 - above
    nearest = _extremes(values, int(torch.maximum(below, above).max()) + 1, upper).T
    return torch.lerp(nearest[below], nearest[above], weights)


_BLOCK = 32


def _extremes(values: Tensor, count: int, largest: bool) -> Tensor:
    """The `count` largest or smallest values of each row, the outermost first."""
    blocks = values.shape[1] // _BLOCK
    if count < blocks // 2:
        # They lie in as many blocks at most, those with the outermost value of their own: few of the many are sorted.
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


def mse_range(values: Tensor, levels: int) -> Range:
    """The range with the smallest mean |x - x̂|^2.4 among 100 widths and all zero points.

    ADFQ-ViT's search for the operands of its matrix products. Ranges include 0; data on one side of 0 has its
    zero point at that end. The candidates are scored on a histogram (on the values themselves where they are
    few), zero points coarse to fine, since shifting a range of given width costs clipping on one side and
    saves it on the other; the shortlist is then scored on the values. Arguments and results as in
    `minmax_range`.
    """
    found = [_mse_range_of_row(row, levels) for row in thin_out(values)]
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
    """Bin means and counts; the values themselves and None where there are no more of them than bins."""
    if len(values) <= _BINS:
        return values, None
    low, high = torch.aminmax(values)
    # In double: the extent may be 0 or next to it.
    bins = ((values - low).double() * _BINS / (high - low).double().clamp(min=1e-300)).long().clamp_(max=_BINS - 1)
    counts = torch.bincount(bins, minlength=_BINS)
    sums = torch.bincount(bins, weights=values.double(), minlength=_BINS)
    filled = counts > 0
    return (sums[filled] / counts[filled]).to(values.dtype), counts[filled].to(values.dtype)


def _best(candidates: Tensor, points: Tensor, weights: Tensor | None, levels: int) -> Tensor:
    """The best of C×2 candidates (scale, zero point), best first."""
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
