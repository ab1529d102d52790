"""I&S-ViT (arXiv 2311.10126): a shifted logarithm after softmax, and three stages on the way to full quantization."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.method import Method, Run
from adfq.quantizers import ShiftUniformLogQuantizer, UniformQuantizer
from adfq.sites import Network, Recipe
from adfq.transforms.reparameterization import NormGroup, norms_with_readers, reparameterize

REPARAMETERIZED = ("qkv", "fc1")

_CALIBRATED = 64  # images that ranges of activations are found on, as in the released code


@dataclass(frozen=True)
class IASViT(Method):
    """I&S-ViT: activations quantized per channel first, then per tensor by reparameterization, then weights.

    The image stays in full precision, attention after softmax is quantized by shift-uniform-log2. A layer whose
    LayerNorm has readers of another kind or no bias is per tensor from the start.

    Attributes:
        released: True for 2^bits + 1 codes after softmax, as in the released code.
    """

    label = "I&S-ViT"
    paper = "arXiv 2311.10126"
    calibration_size = 1024

    released: bool = False

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range="percentile"),
            weight=partial(UniformQuantizer, bits.weight, "row", "percentile9"),
            activations={
                "patch_embed": lambda: None,
                "probs": partial(ShiftUniformLogQuantizer, bits.activation, self.released),
            },
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        for group in self.quantize_activations(network, run, bits):
            reparameterize(*group)
        quantize_weights(network)

    def quantize_activations(self, network: Network, run: Run, bits: Bits) -> list[NormGroup]:
        """Attach quantizers and calibrate those of activations, with weights in full precision: stage 1.

        Args:
            network: an adapted model without quantizers.
            run: calibration images.
            bits: bit-widths of weights and activations.

        Returns:
            LayerNorms with their readers, whose inputs are quantized per channel until stage 2 reparameterizes them.
        """
        network.attach(self.recipe(bits))
        groups = norms_with_readers(network, REPARAMETERIZED)
        for layer in (layer for group in groups for layer in group.layers):
            layer.input_quantizer = UniformQuantizer(bits.activation, "channel", "percentile")
        calibrate_activations(network, run.images.first(_CALIBRATED))
        return groups
