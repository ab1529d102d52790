"""Channel scales that are powers of two apart: an example of a method in a package of its own."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.method import Method, Run
from adfq.quantizers import LogQuantizer, UniformQuantizer
from adfq.sites import POST_NORM_ROLES, Network, Recipe


class PowerOfTwoChannelQuantizer(UniformQuantizer):
    """A uniform quantizer with one scale per channel: the largest scale divided by 2^k, k = 0 … shifts."""

    def __init__(self, bits: int, shifts: int) -> None:
        super().__init__(bits, "channel", "percentile")
        self.shifts = shifts

    def _find_range(self, x: Tensor) -> None:
        super()._find_range(x)
        finest = self.scale.amax() / 2**self.shifts
        scale = finest * 2 ** (self.scale / finest).log2().ceil().clamp(min=0)  # up: no range becomes narrower
        self.zero_point = (self.zero_point * self.scale / scale).round()
        self.scale = scale


@dataclass(frozen=True)
class Pow2Channels(Method):
    """Power-of-two channel scales after LayerNorm, logarithmic attention, everything else as in Base PTQ.

    Attributes:
        shifts: the largest number of powers of two between channel scales.
        log_base: base of the logarithm after softmax.
    """

    label = "Pow2-Channels"

    shifts: int = 3
    log_base: float = 2**0.5

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        per_channel = partial(PowerOfTwoChannelQuantizer, bits.activation, self.shifts)
        activations = dict.fromkeys(POST_NORM_ROLES, per_channel) | {
            "patch_embed": partial(UniformQuantizer, 8, range="percentile"),
            "probs": partial(LogQuantizer, bits.activation, self.log_base),
        }
        uniform = partial(UniformQuantizer, bits.activation, range="percentile")
        return Recipe(uniform, partial(UniformQuantizer, bits.weight, "row", "percentile"), activations)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place."""
        network.attach(self.recipe(bits))
        quantize_weights(network)
        calibrate_activations(network, run.images)
