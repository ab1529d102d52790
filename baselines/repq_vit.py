"""RepQ-ViT (ICCV 2023, arXiv 2212.08254): calibration per channel, then reparameterization to per tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from adfq.bits import Bits
from adfq.method import Method, Run
from adfq.quantizers import LogQuantizer, UniformQuantizer
from adfq.sites import Network, Recipe
from adfq.transforms.reparameterization import calibrate_reparameterized


@dataclass(frozen=True)
class RepQViT(Method):
    """RepQ-ViT: per-channel ranges after LayerNorm, made per tensor by scale reparameterization (section 3.2).

    Post-softmax attention is quantized in base √2 (section 3.3), the input image at 8 bits. Layers that share a
    LayerNorm are reparameterized together. A layer whose LayerNorm has readers of another kind or no bias is per tensor
    from the start.
    """

    label = "RepQ-ViT"
    paper = "arXiv 2212.08254"

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range="percentile"),
            weight=partial(UniformQuantizer, bits.weight, "row", "percentile"),
            activations={
                "patch_embed": partial(UniformQuantizer, 8, range="percentile"),
                "probs": partial(LogQuantizer, bits.activation),
            },
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        by_channel = partial(UniformQuantizer, bits.activation, "channel", "percentile")
        calibrate_reparameterized(network, run.images, by_channel)
