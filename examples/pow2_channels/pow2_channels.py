"""Channel scales that are powers of two apart: an example of a method of one's own."""

from __future__ import annotations

from torch import Tensor

from adfq.calibration import calibrate_activations, quantize_weights
from adfq.methods import Bits
from adfq.quantizers import LogQuantizer, UniformQuantizer
from adfq.sites import POST_NORM_ROLES, Network, Recipe


class PowerOfTwoChannelQuantizer(UniformQuantizer):
    """Uniform quantization with one scale a channel, each of them the largest one divided by 2^k, k = 0 … shifts.

    A product with a weight then needs one integer accumulator, into which codes of a channel go shifted. (The idea is
    the power-of-two factor of FQ-ViT, arXiv 2111.13824, which finds each k by its error.)

    Args:
        bits: 2 to 8.
        shifts: the largest k, at least 0; 0 gives all channels the largest scale.
    """

    def __init__(self, bits: int, shifts: int) -> None:
        super().__init__(bits, "channel", "percentile")
        self.shifts = shifts

    def _find_range(self, x: Tensor) -> None:
        super()._find_range(x)
        finest = self.scale.amax() / 2**self.shifts
        scale = finest * 2 ** (self.scale / finest).log2().ceil().clamp(min=0)  # up: no range becomes narrower
        self.zero_point = (self.zero_point * self.scale / scale).round()
        self.scale = scale


def pow2_channels(network: Network, images: Tensor, bits: Bits, *, shifts: int = 3, log_base: float = 2**0.5) -> None:
    """Post-LayerNorm activations with channel scales that are powers of two apart, post-softmax attention logarithmic,
    everything else as in plain PTQ.

    Options:
        shifts: by how many powers of two channel scales may differ.
        log_base: after softmax.
    """
    recipe = Recipe(
        activation=lambda: UniformQuantizer(bits.activation, range="percentile"),
        weight=lambda: UniformQuantizer(bits.weight, "row", "percentile"),
        activations={
            "patch_embed": lambda: UniformQuantizer(8, range="percentile"),
            "probs": lambda: LogQuantizer(bits.activation, log_base),
            **dict.fromkeys(POST_NORM_ROLES, lambda: PowerOfTwoChannelQuantizer(bits.activation, shifts)),
        },
    )
    network.attach(recipe)
    quantize_weights(network)
    calibrate_activations(network, images)
