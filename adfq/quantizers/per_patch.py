"""ADFQ-ViT's per-patch outlier-aware quantizer."""

from __future__ import annotations

import torch
from torch import Tensor

from adfq.errors import AdfqError
from adfq.quantizers.uniform import UniformQuantizer


class PerPatchOutlierQuantizer(UniformQuantizer):
    """Keeps values beyond ±threshold as they are and quantizes the rest uniformly, patch by patch.

    For post-LayerNorm activations (ADFQ-ViT, section "per-patch outlier-aware quantizer"): outliers count as 0
    while a patch's range is found and its values are quantized, and are put back afterwards.

    Args:
        bits: 2 to 8.
        threshold: α, above 0; in the activation's units.

    Attributes:
        scale: float32, 1×N×1 (1×H×W×1 for B×H×W×C activations).
        zero_point: like `scale`.

    Raises:
        AdfqError: for another threshold or bit-width; in `forward`, for another number of tokens than in
            calibration.
    """

    def __init__(self, bits: int, threshold: float) -> None:
        super().__init__(bits, granularity="patch", range="percentile")
        if not threshold > 0:
            raise AdfqError(f"the outlier threshold must be above 0, got {threshold}")
        self.threshold = threshold

    def outliers(self, x: Tensor) -> Tensor:
        """Which values are kept: bool, the shape of `x`."""
        return x.abs() > self.threshold

    def _find_range(self, x: Tensor) -> None:
        super()._find_range(x.masked_fill(self.outliers(x), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        outliers = self.outliers(x)
        return torch.where(outliers, x, super().forward(x.masked_fill(outliers, 0.0)))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, threshold={self.threshold}"
