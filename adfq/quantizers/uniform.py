"""Asymmetric uniform quantization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.quantizers.base import Quantizer, rescale
from adfq.ranges import RANGES, fake_quantize
from adfq.statistics import Search

GRANULARITIES = ("tensor", "channel", "row", "patch", "head", "head_channel")


def quantize_uniformly(
    x: Tensor, scale: Tensor, zero_point: Tensor, levels: int, straight_through: bool = True
) -> Tensor:
    """Return `fake_quantize` of `x` with the gradients of `rescale`.

    Args:
        x: float32, any shape.
        scale: step size; broadcasts against `x`.
        zero_point: code of 0; broadcasts against `x`.
        levels: number of codes, 2^bits.
        straight_through: see `rescale`.
    """
    if not torch.is_grad_enabled():
        return fake_quantize(x, scale, zero_point, levels)
    with torch.no_grad():
        ratio = x / scale
        unlimited = ratio.round().add_(zero_point)
        codes = unlimited.clamp(0, levels - 1)
        inside = unlimited.eq_(codes)
    return rescale(x, scale, ratio, codes.sub_(zero_point), inside, straight_through)


class UniformQuantizer(Quantizer):
    """Asymmetric uniform quantizer: q = clamp(round(x/scale) + zero_point, 0, 2^bits - 1), x̂ = scale·(q - zero_point).

    Args:
        bits: bit-width, 2 to 8.
        granularity: values that share a scale and zero point. ``"tensor"``, the default: all. ``"channel"``: those of
            one index of the last dimension, an activation's channel. ``"row"``: those of one index of the first
            dimension, a weight's output channel. ``"patch"``: those of one token position of a B×N×C or B×H×W×C
            activation, over batch and channels. ``"head"``: those of one head of a B×H×N×d operand of attention (Swin:
            B windows), with a scale of 1×H×1×1. ``"head_channel"``: those of one channel of one head, 1×H×1×d.
        range: search for the range in `adfq.ranges`: ``"minmax"``, the default, ``"percentile"``,
            ``"percentile9"``, ``"percentile10"`` or ``"mse"``.

    Attributes:
        scale: float32, as many dimensions as the calibration tensor; none for ``"tensor"``.
        zero_point: float32, the shape of `scale`; a whole number after calibration. RepQ-ViT sets means of these.

    Raises:
        AdfqError: for another granularity, range or bit-width; in calibration, for a tensor with too few dimensions for
            the granularity; in `forward` with ``"patch"``, for another number of tokens than in calibration.
    """

    zero_point: Tensor
    _placeholder: Tensor  # mask of the scales that come from no data; empty for those that were not found here

    def __init__(self, bits: int, granularity: str = "tensor", range: str = "minmax") -> None:
        super().__init__(bits)
        if granularity not in GRANULARITIES:
            raise AdfqError(f"unknown granularity {granularity!r}; there are {', '.join(GRANULARITIES)}")
        if range not in RANGES:
            raise AdfqError(f"unknown range {range!r}; there are {', '.join(RANGES)}")
        self.granularity = granularity
        self.range = range
        self.register_buffer("zero_point", torch.empty(0))
        self.register_buffer("_placeholder", torch.empty(0, dtype=torch.bool), persistent=False)
        self._shape: list[int] = []

    @property
    def has_range(self) -> Tensor:
        """Mask of the scales that come from data: bool, the shape of `scale`."""
        return ~self._placeholder if self._placeholder.numel() else super().has_range

    def set_range(self, scale: Tensor, zero_point: Tensor, has_range: Tensor | None = None) -> None:
        """Set scale and zero point that were found elsewhere.

        Args:
            scale: above 0, float32; broadcasts against the input.
            zero_point: whole numbers, the shape of `scale`.
            has_range: see `Quantizer.has_range`; None, the default, if all scales come from data.
        """
        self.scale, self.zero_point = scale, zero_point
        self._placeholder = torch.empty(0, dtype=torch.bool) if has_range is None else ~has_range

    def _groups(self, x: Tensor) -> Tensor:
        kept = self._kept_dimensions(x)
        reduced = [dimension for dimension in range(x.dim()) if dimension not in kept]
        self._shape = [size if dimension in kept else 1 for dimension, size in enumerate(x.shape)] if kept else []
        return x.permute(*kept, *reduced).reshape(math.prod(x.shape[dimension] for dimension in kept), -1)

    def _search(self) -> Search[None]:
        found = yield from RANGES[self.range](self.levels)
        self.scale, self.zero_point = found.scale.reshape(self._shape), found.zero_point.reshape(self._shape)
        tiny = torch.finfo(found.scale.dtype).tiny * self.levels
        self._placeholder = ((found.scale == 1) & (found.largest < tiny)).reshape(self._shape)

    def _kept_dimensions(self, x: Tensor) -> list[int]:
        least = {"tensor": 0, "patch": 3, "head": 4, "head_channel": 4}.get(self.granularity, 2)
        if x.dim() < least or ("head" in self.granularity and x.dim() > least):
            raise AdfqError(f"granularity {self.granularity!r} does not fit a tensor of shape {tuple(x.shape)}")
        dimensions = list(range(x.dim()))
        return {
            "tensor": [],
            "channel": dimensions[-1:],
            "row": dimensions[:1],
            "patch": dimensions[1:-1],
            "head": dimensions[1:2],
            "head_channel": dimensions[1::2],
        }[self.granularity]

    def _check_positions(self, x: Tensor) -> None:
        if self.granularity == "patch" and x.shape[1:-1] != self.scale.shape[1:-1]:
            raise AdfqError(
                f"calibrated for {tuple(self.scale.shape[1:-1])} token positions, got {tuple(x.shape[1:-1])}"
            )

    def _quantize(self, x: Tensor) -> Tensor:
        self._check_positions(x)
        return quantize_uniformly(x, self.scale, self.zero_point, self.levels, self.straight_through)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of `x`: uint8, the shape of `x`.

        Quantized values have the codes that they came from, also when they have been cast to float16, or to bfloat16 up
        to 7 bits.

        Args:
            x: values of any floating-point dtype; the zero point must be a whole number.
        """
        return (x.float() / self.scale).round_().add_(self.zero_point).clamp_(0, self.levels - 1).to(torch.uint8)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes, bit for bit the result of `forward`: float32, the shape of `codes`.

        Args:
            codes: uint8, from `encode`.
        """
        return codes.float().sub_(self.zero_point).mul_(self.scale)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        # Many rows may share a scale all the same, as PTQ4ViT's of a query do; a few may have equal ones by chance.
        distinct = self.scale.unique().numel()
        shared = f" ({distinct} distinct)" if 1 < distinct <= self.scale.numel() / 2 else ""
        return f"uniform, {self.bits} bits, per {self.granularity}{shared}"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"{super().extra_repr()}, granularity={self.granularity!r}, range={self.range!r}"
