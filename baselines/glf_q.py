"""GLF-Q (arXiv 2609.34564): rotations, ReLU in MLPs, blocks reconstructed for the network's feature and their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.errors import AdfqError
from adfq.method import Run
from adfq.quantizers import UniformQuantizer
from adfq.ranges import RANGES
from adfq.reconstruction import (
    Composition,
    Divergence,
    Loss,
    OptimizerOptions,
    OptimizingMethod,
    Steps,
    SuffixFeature,
    Trained,
    Unit,
    Weights,
    optimize_units,
)
from adfq.reconstruction.mlps import reconstruct_mlps
from adfq.reconstruction.options import check_number
from adfq.sites import Network, Recipe
from adfq.transforms.reparameterization import calibrate_reparameterized
from adfq.transforms.rotation import rotate

_CLIPPED = 0.99  # part of the values behind ReLU that the MLPs' reconstruction does not clip


@dataclass(frozen=True)
class GLFQ(OptimizingMethod):
    """GLF-Q: rotated network, ReLU in place of GELU, uniform quantizers, blocks trained for features global and local.

    Queries, keys and values are rotated head by head, and the residual stream where there is one alone: in ViT, DeiT
    and Segment Anything. In others, such as Swin, layers behind a LayerNorm are calibrated per channel and
    reparameterized to one scale. Weights are trained straight through the rounding, beside step sizes, on the quantized
    network's inputs (`adfq.reconstruction.SuffixFeature`). With 0 iterations of blocks the model is calibrated alone,
    and keeps GELU.

    Attributes:
        rotations: False leaves the network as it is.
        relu: False keeps GELU.
        range: the search for the range of a quantizer, one of `adfq.ranges.RANGES`.
        local_weight: λ, the weight of the unit's own error beside the feature's, above 0.
        mlp_iterations: iterations of each MLP's reconstruction.
        mlp_learning_rate: its learning rate (Adam, cosine to 0).
        weight_learning_rate: learning rate of weights and biases (Adam, cosine to 0).
        step_learning_rate: learning rate of activation step sizes (Adam, cosine to 0), limited to a hundredth of the
            step size.

    Raises:
        AdfqError: for a value out of range.
    """

    label = "GLF-Q"
    paper = "arXiv 2609.34564"
    calibration_size = 1024

    rotations: bool = True
    relu: bool = True
    range: str = "mse"
    local_weight: float = 2.0
    mlp_iterations: int = 20000
    mlp_learning_rate: float = 4e-5
    weight_learning_rate: float = 2e-5
    step_learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mlp_learning_rate", "weight_learning_rate", "step_learning_rate"):
            check_number(self, name)
        if self.range not in RANGES:
            raise AdfqError(f"unknown range {self.range!r}; there are {', '.join(RANGES)}")
        check_number(self, "local_weight", positive=True)
        if self.mlp_iterations < 0:
            raise AdfqError(f"mlp_iterations must be at least 0, got {self.mlp_iterations}")

    @property
    def trains(self) -> str:
        """Weights, or those of MLPs alone, and step sizes; with learning rates above 0, none without iterations."""
        if not self.iterations:
            return ""
        mlps = "weights of MLPs" if self.relu and self.mlp_iterations else ""
        weights = "weights" if self.weight_learning_rate else mlps
        return ", ".join(filter(None, (weights, "step sizes" if self.step_learning_rate else "")))

    @property
    def trained_iterations(self) -> int:
        """Iterations of an MLP and of its block together."""
        return self.iterations + (self.mlp_iterations if self.relu and self.iterations else 0)

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range=self.range),
            weight=partial(UniformQuantizer, bits.weight, "row", self.range),
            activations={"patch_embed": partial(UniformQuantizer, 8, range=self.range)},
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        whole = self.rotations and len(network.streams) == 1 and not network.unrotated
        if self.rotations and (left := rotate(network, streams=whole)):
            run.report["unrotated"] = left
        teacher = copy.deepcopy(network)
        if self.relu and self.iterations:
            options = OptimizerOptions(self.mlp_iterations, self.optimize_batch_size, autocast=self.autocast)
            reconstruct_mlps(network, teacher, run, options, self.mlp_learning_rate, _CLIPPED)
        self._calibrate(network, run, bits, reparameterized=not whole)
        if self.iterations:
            composition = Composition(losses=self._losses, trained=self._trained, mix_probability=1.0)
            results = optimize_units(network, run, self, composition, teacher)
            run.report["modules"] = {name: asdict(result) for name, result in results.items()}

    def _calibrate(self, network: Network, run: Run, bits: Bits, reparameterized: bool) -> None:
        network.attach(self.recipe(bits))
        if reparameterized:
            by_channel = partial(UniformQuantizer, bits.activation, "channel", self.range)
            calibrate_reparameterized(network, run.images, by_channel)
        else:
            quantize_weights(network)
            calibrate_activations(network, run.images)

    def _losses(self, unit: Unit) -> Sequence[Loss]:
        return [Divergence(unit) if unit.is_head else SuffixFeature(unit, self.local_weight)]

    def _trained(self, unit: Unit) -> Sequence[Trained]:
        found: list[Trained] = []
        if self.weight_learning_rate:
            found.append(Weights(unit, self.weight_learning_rate, self.iterations))
        if self.step_learning_rate:
            found.append(Steps(unit, self.step_learning_rate, self.iterations))
        return found
