"""Plain post-training quantization: the floor that every table needs."""

from __future__ import annotations

from torch import Tensor

from adfq.calibration import calibrate_activations, quantize_weights
from adfq.methods import Bits
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Recipe


def base_ptq(network: Network, images: Tensor, bits: Bits, *, range: str = "percentile") -> None:
    """Uniform quantization, per tensor for activations and per output channel for weights; input image at 8 bits.

    Options:
        range: ``"percentile"``, ``"minmax"`` or ``"mse"``.
    """
    network.attach(
        Recipe(
            activation=lambda: UniformQuantizer(bits.activation, range=range),
            weight=lambda: UniformQuantizer(bits.weight, "row", range),
            activations={"patch_embed": lambda: UniformQuantizer(8, range=range)},
        )
    )
    quantize_weights(network)
    calibrate_activations(network, images)
