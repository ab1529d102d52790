"""Computation on a few values at a time, which stay in the processor's cache meanwhile and need no new memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_PART = 2**18


def in_parts(function: Callable[[Tensor, Tensor], object], x: Tensor) -> Tensor:
    """Return `function` of `x`, computed on a CPU for a few indices of the first dimension at a time.

    Quantization passes over its values several times.

    Args:
        function: takes a part of `x` and an output of its shape, and writes the result to the output; each index of the
            first dimension must be independent of the others. No gradient.
        x: any shape.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = rows_of_part(x)
    if rows >= len(x):
        function(x, result)
        return result
    for part, place in zip(x.split(rows), result.split(rows), strict=True):
        function(part, place)
    return result


def rows_of_part(x: Tensor) -> int:
    """Return the number of indices of the first dimension that make a part: all on a GPU.

    Args:
        x: any shape.
    """
    whole = x.device.type != "cpu" or x.numel() <= _PART
    return max(1, len(x) if whole else _PART * len(x) // x.numel())
