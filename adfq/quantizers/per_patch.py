"""ADFQ-ViT's per-patch outlier-aware quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.quantizers.base import Quantizer
from adfq.quantizers.uniform import UniformQuantizer, quantize_uniformly
from adfq.ranges import in_parts, minmax_range


class OutlierQuantizer(Quantizer):
    """Keeps values beyond ±threshold as they are, whatever the next class in line does with the rest.

    For post-LayerNorm activations (ADFQ-ViT, section "per-patch outlier-aware quantizer"): outliers count as 0
    while a range is found and values are quantized, and are put back afterwards.

    Attributes:
        threshold: α, above 0; in the activation's units.
    """

    def __init__(self, threshold: float, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        if not threshold > 0:
            raise AdfqError(f"the outlier threshold must be above 0, got {threshold}")
        self.threshold = threshold

    def outliers(self, x: Tensor) -> Tensor:
        """Which values are kept: bool, the shape of `x`."""
        return x.abs() > self.threshold

    def _find_range(self, x: Tensor) -> None:
        super()._find_range(x.masked_fill(self.outliers(x), 0.0))  # type: ignore[safe-super]

    def forward(self, x: Tensor) -> Tensor:
        def quantize(part: Tensor, out: Tensor | None = None) -> Tensor:
            return torch.where(self.outliers(part), part, between(part), out=out)

        between = super().forward
        return quantize(x) if torch.is_grad_enabled() else in_parts(quantize, x)

    def describe(self) -> str:
        return f"per-patch outlier, {self.bits} bits, threshold {self.threshold:g}"

    def extra_repr(self) -> str:
        return f"bits={self.bits}, threshold={self.threshold}"


class PerPatchOutlierQuantizer(OutlierQuantizer, UniformQuantizer):
    """Uniform quantization patch by patch, each token position with the range that it had in calibration.

    Args:
        bits: 2 to 8.
        threshold: see `OutlierQuantizer`.

    Attributes:
        scale: float32, 1×N×1 (1×H×W×1 for B×H×W×C activations).
        zero_point: like `scale`.

    Raises:
        AdfqError: for another threshold or bit-width; in `forward`, for another number of tokens than in
            calibration.
    """

    def __init__(self, bits: int, threshold: float) -> None:
        super().__init__(threshold, bits, "patch", "percentile")


class RunTimePatchOutlierQuantizer(OutlierQuantizer):
    """Uniform quantization patch by patch, the range taken from the patch itself at run time.

    For activations whose number of tokens changes from image to image, so that there are no positions to calibrate. A
    patch's range is that of its values, outliers aside; it has too few of them for percentiles to differ.

    Args:
        bits: 2 to 8.
        threshold: see `OutlierQuantizer`.

    Attributes:
        scale: float32 scalar, by which the step that just covers a patch is multiplied: 1 after calibration.
    """

    def __init__(self, bits: int, threshold: float) -> None:
        super().__init__(threshold, bits)

    def _find_range(self, x: Tensor) -> None:
        self.scale = torch.ones((), device=x.device)

    def _quantize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            inner = x.masked_fill(self.outliers(x), 0.0)
            ranges = minmax_range(inner.reshape(-1, x.shape[-1]), self.levels)
            covering, zero_point = (values.view(*x.shape[:-1], 1) for values in ranges)
            zero_point = (zero_point / self.scale).round_()
        return quantize_uniformly(x, covering * self.scale, zero_point, self.levels)

    def describe(self) -> str:
        return f"{super().describe()} (ranges at run time)"
