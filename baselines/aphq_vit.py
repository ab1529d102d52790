"""APHQ-ViT (CVPR 2025, arXiv 2504.02508): ReLU in MLPs, blocks reconstructed under an importance of each element."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.method import Run
from adfq.output_error import APHQ, Settings, calibrate_by_output_error
from adfq.reconstruction import (
    Composition,
    Divergence,
    Loss,
    OptimizerOptions,
    RoundingMethod,
    Unit,
    optimize_units,
    roundings_and_steps,
)
from adfq.reconstruction.fisher import Normalized, WeightedError, fisher_diagonal
from adfq.reconstruction.mlps import reconstruct_mlps
from adfq.reconstruction.options import check_number
from adfq.sites import Network, Recipe

_TEMPERATURE = 20.0


@dataclass(frozen=True)
class APHQViT(RoundingMethod):
    """APHQ-ViT: MLP reconstruction with ReLU, calibration by output errors, block reconstruction by importance.

    MLPs of two linear layers get ReLU in the place of GELU, and are trained in full precision to give the original
    one's outputs, also where the activation is clipped (section "MLP reconstruction"). Uniform quantizers, per head in
    matrix products, are searched for each layer's output. Blocks are reconstructed with an error that is weighted by
    each element's importance, mixed inputs and dropped quantization. With 0 iterations of blocks the model is
    calibrated alone, and keeps GELU.

    The importance is the diagonal of the Fisher information, which the paper's average perturbation Hessian stands for.
    The released code adds the same ε to all channels, which LayerNorm takes out again: its importance is rounding
    noise, and is not reproduced.

    Attributes:
        relu: False keeps GELU.
        mlp_iterations: iterations of each MLP's reconstruction.
        mlp_learning_rate: its learning rate (Adam, cosine to 0).
        labels: labels drawn of each image for the importance; as many as there are classes, or more, give it exactly.
        power: exponent of the importance; 1, or ½ for what the released noise amounts to.
        released_grid: True for the released code's candidates above 4 bits.

    Raises:
        AdfqError: for a value out of range.
    """

    label = "APHQ-ViT"
    paper = "arXiv 2504.02508"
    calibration_size = 1024

    relu: bool = True
    mlp_iterations: int = 20000
    mlp_learning_rate: float = 4e-5
    labels: int = 4
    power: float = 1.0
    released_grid: bool = False
    iterations: int = 20000
    drop_probability: float = 0.5
    rounding_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "mlp_learning_rate")
        check_number(self, "power", positive=True)
        if self.labels < 1 or self.mlp_iterations < 0:
            raise AdfqError("labels must be at least 1, mlp_iterations at least 0")

    @property
    def trains(self) -> str:
        """Weights of MLPs beside roundings and step sizes; see `adfq.method.Method.trains`."""
        mlps = "weights of MLPs" if self.relu and self.mlp_iterations and self.iterations else ""
        return ", ".join(filter(None, (mlps, super().trains)))

    @property
    def trained_iterations(self) -> int:
        """Iterations of an MLP and of its block together."""
        return self.iterations + (self.mlp_iterations if self.relu and self.iterations else 0)

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return self._settings().recipe(bits)

    def _settings(self) -> Settings:
        return replace(APHQ, released_grid=self.released_grid)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        teacher = copy.deepcopy(network)
        if self.relu and self.iterations:
            reconstruct_mlps(
                network,
                teacher,
                run,
                OptimizerOptions(self.mlp_iterations, self.optimize_batch_size, autocast=self.autocast),
                self.mlp_learning_rate,
                0.99 if bits.activation <= 3 else 0.98,
                lambda unit: fisher_diagonal(unit, _TEMPERATURE, self.labels),
            )
        calibrate_by_output_error(network, run, bits, self._settings())
        if self.iterations:
            composition = Composition(
                losses=self._losses,
                trained=roundings_and_steps(self),
                mix_probability=self.mix_probability,
                drop_probability=self.drop_probability,
            )
            results = optimize_units(network, run, self, composition, teacher)
            run.report["modules"] = {name: asdict(result) for name, result in results.items()}

    def _losses(self, unit: Unit) -> Sequence[Loss]:
        if unit.is_head:
            return [Normalized(Divergence(unit))]
        importance = [found.pow(self.power) for found in fisher_diagonal(unit, _TEMPERATURE, self.labels)]
        return [Normalized(WeightedError(unit, importance))]
