"""QDrop (ICLR 2022, arXiv 2203.05740): blocks reconstructed with quantization dropped at random."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.method import Run
from adfq.quantizers import UniformQuantizer
from adfq.reconstruction import Composition, Divergence, Loss, RoundingMethod, optimize_units, roundings_and_steps
from adfq.sites import Network, Recipe


@dataclass(frozen=True)
class QDrop(RoundingMethod):
    """QDrop: uniform quantization, roundings and step sizes learned block after block.

    Elements of a block's input are the quantized network's or full precision's at random, and elements of activations
    inside are not quantized at random (section 4). Both probabilities at 0 give BRECQ (arXiv 2102.05426) with the
    squared error as its loss. A classifier's head is reconstructed by the divergence of its logits. The input image is
    at 8 bits, and so are no other layers: the published tables keep the first and the last layer at 8 bits.
    """

    label = "QDrop"
    paper = "arXiv 2203.05740"
    calibration_size = 1024

    iterations: int = 20000
    drop_probability: float = 0.5
    rounding_learning_rate: float = 1e-3

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range="mse"),
            weight=partial(UniformQuantizer, bits.weight, "row", "mse"),
            activations={"patch_embed": partial(UniformQuantizer, 8, range="percentile")},
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        quantize_weights(network)
        if self.iterations:
            composition = Composition(
                losses=lambda unit: [Divergence(unit) if unit.is_head else Loss(unit)],
                trained=roundings_and_steps(self),
                mix_probability=self.mix_probability,
                drop_probability=self.drop_probability,
            )
            results = optimize_units(network, run, self, composition)
            run.report["modules"] = {name: asdict(result) for name, result in results.items()}
        calibrate_activations(network, run.images)  # all sites, or those outside of every unit
