"""Base PTQ: plain uniform quantization, the floor that every table needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.method import Method, Run
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Recipe


@dataclass(frozen=True)
class BasePTQ(Method):
    """Uniform quantization, per tensor for activations and per output channel for weights; input image at 8 bits.

    Attributes:
        range: the search for the range of a quantizer, one of `adfq.ranges.RANGES`.
    """

    label = "Base PTQ"

    range: str = "percentile"

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range=self.range),
            weight=partial(UniformQuantizer, bits.weight, "row", self.range),
            activations={"patch_embed": partial(UniformQuantizer, 8, range=self.range)},
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        quantize_weights(network)
        calibrate_activations(network, run.images)
