"""ADFQ-ViT's per-patch outlier-aware quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.parts import in_parts
from adfq.quantizers.base import Quantizer
from adfq.quantizers.uniform import UniformQuantizer, quantize_uniformly
from adfq.ranges import range_between
from adfq.statistics import MinMax, Search


class OutlierQuantizer(Quantizer):
    """Mixin that keeps values beyond ±threshold in full precision; the next class in line quantizes the others.

    For post-LayerNorm activations (ADFQ-ViT, section "per-patch outlier-aware quantizer"). Outliers count as 0 while a
    range is found and values are quantized, and are put back afterwards.

    Args:
        threshold: α, above 0; in the activation's units.
        arguments: positional arguments of the next class in line.

    Attributes:
        threshold: α.

    Raises:
        AdfqError: for a threshold that is not above 0.
    """

    def __init__(self, threshold: float, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        if not threshold > 0:
            raise AdfqError(f"the outlier threshold must be above 0, got {threshold}")
        self.threshold = threshold

    def outliers(self, x: Tensor) -> Tensor:
        """Return a mask of the values that stay in full precision: bool, the shape of `x`."""
        return x.abs() > self.threshold

    def _groups(self, x: Tensor) -> Tensor:
        return super()._groups(x.masked_fill(self.outliers(x), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of `x` with outliers unchanged, in its shape and dtype.

        Args:
            x: B×N×C or B×H×W×C.

        Raises:
            RuntimeError: before calibration.
        """

        def quantize(part: Tensor, out: Tensor | None = None) -> Tensor:
            return torch.where(self.outliers(part), part, between(part), out=out)

        between = super().forward
        return quantize(x) if torch.is_grad_enabled() else in_parts(quantize, x)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"per-patch outlier, {self.bits} bits, threshold {self.threshold:g}"

    def extra_repr(self) -> str:
        """Return the constructor's arguments for the module's representation."""
        return f"bits={self.bits}, threshold={self.threshold}"


class PerPatchOutlierQuantizer(OutlierQuantizer, UniformQuantizer):
    """Outlier-aware uniform quantizer with a range for each token position, found in calibration.

    Args:
        bits: bit-width, 2 to 8.
        threshold: α, above 0; see `OutlierQuantizer`.

    Attributes:
        scale: float32, 1×N×1; 1×H×W×1 for B×H×W×C activations.
        zero_point: float32, the shape of `scale`.

    Raises:
        AdfqError: for another threshold or bit-width, and in `forward` for another number of tokens than in
            calibration.
    """

    def __init__(self, bits: int, threshold: float) -> None:
        super().__init__(threshold, bits, "patch", "percentile")


class RunTimePatchOutlierQuantizer(OutlierQuantizer):
    """Outlier-aware uniform quantizer with a range for each patch, found at run time.

    For activations whose number of tokens changes from image to image, so that there are no positions to calibrate. The
    range of a patch is the minimum and maximum of its values without outliers: one patch has too few values for
    percentiles to differ from these.

    Args:
        bits: bit-width, 2 to 8.
        threshold: α, above 0; see `OutlierQuantizer`.

    Attributes:
        scale: float32 scalar factor of the step that just covers a patch; 1 after calibration.

    Raises:
        AdfqError: for another threshold or bit-width.
    """

    def __init__(self, bits: int, threshold: float) -> None:
        super().__init__(threshold, bits)

    def _search(self) -> Search[None]:
        yield (extremes := MinMax())  # for the device alone
        self.scale = torch.ones((), device=extremes.highest.device)

    def _quantize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            inner = x.masked_fill(self.outliers(x), 0.0)
            covering, zero_point = range_between(*inner.aminmax(dim=-1, keepdim=True), self.levels)
            zero_point = (zero_point / self.scale).round_()
        return quantize_uniformly(x, covering * self.scale, zero_point, self.levels, self.straight_through)

    def describe(self) -> str:
        """Return the kind of quantizer and its parameters as one phrase."""
        return f"{super().describe()} (ranges at run time)"
