"""Candidates for scale and zero point of uniform quantizers (AdaLog, APHQ-ViT).

Candidates are K×G×2: scale and zero point of each group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adfq.statistics import Quantiles

CANDIDATES = 128

_COVERING = 16  # zero points of each width, where not all are offered
_LARGE = 2**18  # values of a group; of more than these, the inner quantiles are those of a part

LEAST_ACTIVATION_SCALE = 1e-4


def width_grid(
    values: Tensor, levels: int, zero_points: int, least: float = 0.0, released: bool = False
) -> tuple[Tensor, Tensor]:
    """Return pairs of widths, from the middle 80 % of the values to all, and zero points.

    Up to 16 levels, zero points lie around the middle of the codes. Beyond, a window of 16 of them would leave a
    one-sided tensor half of the codes at 6 bits: each width has the 16 zero points with which it covers the most of the
    data. Widths include 0 where all data lies on one side of it.

    Args:
        values: G×n.
        levels: number of codes, 2^bits.
        zero_points: number of zero points, at least 1, at 16 levels and below.
        least: least scale; 0, the default, for none.
        released: True for the window of zero points at all bit-widths, and widths of the data alone, as in the released
            code; False by default.

    Returns:
        Candidates (K×G×2) and the difference of neighbouring scales (G).
    """
    lowest, highest = torch.aminmax(values, dim=1)
    lower, upper = torch.quantile(_some(values), torch.tensor((0.1, 0.9), device=values.device), dim=1)
    inner, whole = upper - lower, highest - lowest
    if not released:
        whole = highest.clamp(min=0) - lowest.clamp(max=0)
    covering = levels > 16 and not released
    zero_points = _COVERING if covering else min(zero_points, CANDIDATES // 2)
    count = CANDIDATES // zero_points
    parts = torch.linspace(0, 1, count, device=values.device)[:, None]
    scales = torch.lerp(inner, whole, parts) / (levels - 1)
    # Groups without an extent, or whose middle has none, have no scale 0 all the same.
    scales = scales.clamp(min=least).maximum(whole / (1000 * levels))
    scales = torch.where(whole > 0, scales, torch.ones_like(scales))
    if covering:
        zeros = _covering_zero_points(scales, lowest, highest, levels)
    else:
        first = levels // 2 - zero_points // 2
        zeros = torch.arange(first, first + zero_points, device=values.device, dtype=scales.dtype)
        zeros = zeros[:, None, None].expand(-1, *scales.shape)
    grid = torch.stack((scales.expand_as(zeros), zeros), -1)
    return grid.flatten(0, 1), scales[1] - scales[0]


def _covering_zero_points(scales: Tensor, lowest: Tensor, highest: Tensor, levels: int) -> Tensor:
    """Return the zero points from a range that begins with the data to one that ends with it, Z×W×G."""
    first = -lowest.clamp(max=0) / scales
    last = levels - 1 - highest.clamp(min=0) / scales
    parts = torch.linspace(0, 1, _COVERING, device=scales.device)[:, None, None]
    return torch.lerp(first, last, parts).round_().clamp_(0, levels - 1)


def tails(values: Tensor, fractions: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return quantiles at both ends: those of 1 - fractions and those of fractions, 2×G each.

    Args:
        values: G×n.
        fractions: near 1, in ascending order.
    """
    upper = Quantiles(fractions, upper=True)
    lower = Quantiles([1 - fraction for fraction in fractions], upper=False)
    for statistic in (upper, lower):
        statistic.update(values, 1.0)
    return lower.result(), upper.result()


def operand_ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return APHQ-ViT's candidates for the lower and upper ends of a matrix product's operand, 128×G each.

    Args:
        values: G×n.
    """
    (low_inner, low_outer), (high_inner, high_outer) = tails(values, (0.99, 0.99999))
    parts = torch.arange(CANDIDATES, device=values.device)[:, None] / CANDIDATES
    return low_outer + parts * (low_inner - low_outer), high_inner + parts * (high_outer - high_inner)


def patch_embedding_ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return APHQ-ViT's candidates for the lower and upper ends of a patch embedding's rows, 128×G each.

    Args:
        values: G×n.
    """
    fractions = 0.99 + 0.0099 * torch.linspace(0, 1, CANDIDATES, device=values.device).sqrt()
    return torch.quantile(values, 1 - fractions, dim=1), torch.quantile(values, fractions, dim=1)


def between(ends: Tensor, levels: int) -> Tensor:
    """Return scale and zero point of the ranges between ends, …×2.

    Args:
        ends: lower and upper ends, …×2.
        levels: number of codes, 2^bits.
    """
    lower, upper = ends.unbind(-1)
    scales = (upper - lower) / (levels - 1)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return torch.stack((scales, -(lower / scales).round()), -1)


def positive_ends(values: Tensor, fractions: Sequence[float]) -> list[Tensor]:
    """Return the ⌈fraction·n⌉-th smallest of the n positive values for each fraction, at least one of which there is.

    Args:
        values: any shape.
        fractions: above 0, up to 1.
    """
    positive = values[values > 0]
    largest = positive.max()
    positive = positive[:: max(1, len(positive) // _LARGE)]
    # In double precision, 0.9·n may lie just above a whole number.
    ranks = [-(-round(fraction * 1e6) * len(positive) // 10**6) for fraction in fractions]
    return [largest if rank == len(positive) else positive.kthvalue(rank).values for rank in ranks]


def _some(values: Tensor) -> Tensor:
    return values[:, :: max(1, values.shape[1] // _LARGE)]
