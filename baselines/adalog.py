"""AdaLog (ECCV 2024, arXiv 2407.12951): adaptive logarithmic quantizers, found by the layers' output errors."""

from __future__ import annotations

from dataclasses import dataclass

from adfq.bits import Bits
from adfq.method import Method, Run
from adfq.output_error import Settings, calibrate_by_output_error
from adfq.sites import Network, Recipe
from adfq.transforms.shift import fold_shift


@dataclass(frozen=True)
class AdaLog(Method):
    """AdaLog: logarithmic quantizers with an adapted base after softmax and GELU, uniform ones per head or tensor.

    The input image stays in full precision. Layers behind a LayerNorm are reparameterized to one scale, as in RepQ-ViT.
    All ranges are those with the smallest error of the layer's output, found by progressive refinement (FPCS). At last
    the shift behind GELU is folded into the bias (bias reparameterization).

    Layers that are used several times in a pass, convolutions other than the patch embedding and matrix products
    without heads have plain percentile ranges, per tensor and per output channel.

    Attributes:
        rounds: number of searches over both quantizers of a layer.
        released_grid: True for the released code's candidates above 4 bits, whose zero points leave a one-sided tensor
            half of the codes.
    """

    label = "AdaLog"
    paper = "arXiv 2407.12951"

    rounds: int = 3
    released_grid: bool = False

    def __post_init__(self) -> None:
        self.settings  # noqa: B018  # raises for unusable options

    @property
    def settings(self) -> Settings:
        """Settings of the search."""
        return Settings(rounds=self.rounds, released_grid=self.released_grid)

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return self.settings.recipe(bits)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        calibrate_by_output_error(network, run, bits, self.settings)
        for _, layer in network.weight_layers():
            fold_shift(layer)
