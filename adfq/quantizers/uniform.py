"""Asymmetric uniform quantization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.quantizers.base import Quantizer, rescale
from adfq.ranges import RANGES, fake_quantize

GRANULARITIES = ("tensor", "channel", "row", "patch")


def quantize_uniformly(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """`fake_quantize` with the gradients of `rescale`; `scale` and `zero_point` broadcast against `x`."""
    if not torch.is_grad_enabled():
        return fake_quantize(x, scale, zero_point, levels)
    with torch.no_grad():
        ratio = x / scale
        unlimited = ratio.round().add_(zero_point)
        codes = unlimited.clamp(0, levels - 1)
        inside = unlimited.eq_(codes)
    return rescale(x, scale, ratio, codes.sub_(zero_point), inside)


class UniformQuantizer(Quantizer):
    """q = clamp(round(x/scale) + zero_point, 0, 2^bits - 1), x̂ = scale·(q - zero_point).

    Args:
        bits: 2 to 8.
        granularity: what shares a scale and zero point: ``"tensor"`` all values; ``"channel"`` the values of one
            index of the last dimension (an activation's channel); ``"row"`` those of one index of the first
            dimension (a weight's output channel); ``"patch"`` those of one token position of a B×N×C or B×H×W×C
            activation, over batch and channels.
        range: how the range is found, `adfq.ranges`: ``"minmax"``, ``"percentile"`` or ``"mse"``.

    Attributes:
        scale: float32, as many dimensions as the calibration tensor (none for ``"tensor"``).
        zero_point: float32, like `scale`; a whole number after calibration (RepQ-ViT sets means of such).

    Raises:
        AdfqError: for another granularity, range or bit-width; in `forward` with ``"patch"``, for another number
            of tokens than in calibration.
    """

    zero_point: Tensor

    def __init__(self, bits: int, granularity: str = "tensor", range: str = "minmax") -> None:
        super().__init__(bits)
        if granularity not in GRANULARITIES:
            raise AdfqError(f"unknown granularity {granularity!r}; there are {', '.join(GRANULARITIES)}")
        if range not in RANGES:
            raise AdfqError(f"unknown range {range!r}; there are {', '.join(RANGES)}")
        self.granularity = granularity
        self.range = range
        self.register_buffer("zero_point", torch.empty(0))

    def _find_range(self, x: Tensor) -> None:
        kept = self._kept_dimensions(x)
        reduced = [dimension for dimension in range(x.dim()) if dimension not in kept]
        groups = x.permute(*kept, *reduced).reshape(math.prod(x.shape[dimension] for dimension in kept), -1)
        scale, zero_point = RANGES[self.range](groups, self.levels)
        shape = [size if dimension in kept else 1 for dimension, size in enumerate(x.shape)] if kept else []
        self.scale, self.zero_point = scale.reshape(shape), zero_point.reshape(shape)

    def _kept_dimensions(self, x: Tensor) -> list[int]:
        if self.granularity != "tensor" and x.dim() < (3 if self.granularity == "patch" else 2):
            raise AdfqError(f"granularity {self.granularity!r} does not fit a tensor of shape {tuple(x.shape)}")
        dimensions = list(range(x.dim()))
        return {"tensor": [], "channel": dimensions[-1:], "row": dimensions[:1], "patch": dimensions[1:-1]}[
            self.granularity
        ]

    def _quantize(self, x: Tensor) -> Tensor:
        if self.granularity == "patch" and x.shape[1:-1] != self.scale.shape[1:-1]:
            raise AdfqError(
                f"calibrated for {tuple(self.scale.shape[1:-1])} token positions, got {tuple(x.shape[1:-1])}"
            )
        return quantize_uniformly(x, self.scale, self.zero_point, self.levels)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """See `Quantizer.encode`; the zero point must be a whole number.

        Quantized values give back the codes that they came from, also when cast to float16 since, or to bfloat16 up
        to 7 bits.
        """
        return (x.float() / self.scale).round_().add_(self.zero_point).clamp_(0, self.levels - 1).to(torch.uint8)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer.decode`; bit for bit what `forward` gave."""
        return codes.float().sub_(self.zero_point).mul_(self.scale)

    def describe(self) -> str:
        # Many rows may share a scale all the same, as PTQ4ViT's of a query do; a few may have equal ones by chance.
        distinct = self.scale.unique().numel()
        shared = f" ({distinct} distinct)" if 1 < distinct <= self.scale.numel() / 2 else ""
        return f"uniform, {self.bits} bits, per {self.granularity}{shared}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity!r}, range={self.range!r}"
