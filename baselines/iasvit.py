"""I&S-ViT (arXiv 2311.10126): a shifted logarithm after softmax, and three stages on the way to full quantization."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from functools import partial

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.method import Run
from adfq.quantizers import ShiftUniformLogQuantizer, UniformQuantizer
from adfq.reconstruction import Composition, Loss, OptimizingMethod, Weights, optimize_units
from adfq.reconstruction.options import check_number
from adfq.sites import Network, Recipe
from adfq.transforms.reparameterization import NormGroup, norms_with_readers, reparameterize

REPARAMETERIZED = ("qkv", "fc1")

_CALIBRATED = 64  # images that ranges of activations are found on, as in the released code


@dataclass(frozen=True)
class IASViT(OptimizingMethod):
    """I&S-ViT: activations quantized per channel first, then per tensor by reparameterization, then weights.

    Weights and biases are trained twice, block after block, to give full precision's outputs: with quantized
    activations alone on full precision's inputs (stage 1), and after reparameterization (stage 2) with everything
    quantized on the quantized network's (stage 3). Gradients pass straight through the rounding, on ranges that stay.

    The image stays in full precision, attention after softmax is quantized by shift-uniform-log2. A layer whose
    LayerNorm has readers of another kind or no bias is per tensor from the start.

    Attributes:
        released: True for 2^bits + 1 codes after softmax, as in the released code.
        weight_learning_rate: learning rate of weights and biases (Adam, cosine to 0).
    """

    label = "I&S-ViT"
    paper = "arXiv 2311.10126"
    calibration_size = 1024

    released: bool = False
    iterations: int = 1000
    optimize_batch_size: int = 64
    weight_learning_rate: float = 4e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "weight_learning_rate")

    @property
    def trains(self) -> str:
        """Weights and biases; see `adfq.method.Method.trains`."""
        return "weights, biases" if self.iterations and self.weight_learning_rate else ""

    @property
    def trained_iterations(self) -> int:
        """Iterations of a block in both stages together."""
        return 2 * self.iterations if self.trains else 0

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
        teacher = copy.deepcopy(network)
        groups = self.quantize_activations(network, run, bits)
        self._train(network, teacher, run, "activations", mix_probability=0.0)
        for group in groups:
            reparameterize(*group)
        quantize_weights(network)
        self._train(network, teacher, run, "everything", mix_probability=1.0)

    def _train(self, network: Network, teacher: Network, run: Run, stage: str, mix_probability: float) -> None:
        if not self.trains:
            return
        composition = Composition(
            losses=lambda unit: [Loss(unit)],
            trained=lambda unit: [Weights(unit, self.weight_learning_rate, self.iterations)],
            mix_probability=mix_probability,
            stage=f"{stage}.",
        )
        results = optimize_units(network, run, self, composition, teacher)
        run.report[stage] = {name: asdict(result) for name, result in results.items()}

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
