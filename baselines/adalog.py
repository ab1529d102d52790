"""AdaLog (ECCV 2024, arXiv 2407.12951): adaptive logarithmic quantizers, found by the layers' output errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torch import Tensor

from adfq.bits import Bits
from adfq.method import Run
from adfq.output_error import Settings, calibrate_by_output_error
from adfq.quantizers import AdaLogQuantizer
from adfq.reconstruction import (
    Batch,
    Composition,
    Divergence,
    Loss,
    RoundingMethod,
    optimize_units,
    roundings_and_steps,
)
from adfq.sites import Network, Recipe
from adfq.transforms.shift import fold_shift


@dataclass(frozen=True)
class AdaLog(RoundingMethod):
    """AdaLog: logarithmic quantizers with an adapted base after softmax and GELU, uniform ones per head or tensor.

    The input image stays in full precision. Layers behind a LayerNorm are reparameterized to one scale, as in RepQ-ViT.
    All ranges are those with the smallest error of the layer's output, found by progressive refinement (FPCS). At last
    the shift behind GELU is folded into the bias (bias reparameterization).

    With ``reconstruct=True``, roundings and step sizes of blocks are learned before that, on full precision's inputs.
    The logarithmic quantizers then have exact powers of their base, in place of the table that hardware would use.

    Layers that are used several times in a pass, convolutions other than the patch embedding and matrix products
    without heads have plain percentile ranges, per tensor and per output channel.

    Attributes:
        reconstruct: True reconstructs blocks after calibration; False, the default, ignores the options of that.
        rounds: number of searches over both quantizers of a layer.
        released_grid: True for the released code's candidates above 4 bits, whose zero points leave a one-sided tensor
            half of the codes.
    """

    label = "AdaLog"
    paper = "arXiv 2407.12951"

    reconstruct: bool = False
    rounds: int = 3
    released_grid: bool = False
    iterations: int = 20000
    mix_probability: float = 0.0
    rounding_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings  # noqa: B018  # raises for unusable options

    @property
    def trains(self) -> str:
        """Roundings and step sizes with ``reconstruct=True``; see `adfq.method.Method.trains`."""
        return super().trains if self.reconstruct else ""

    @property
    def settings(self) -> Settings:
        """Settings of the search."""
        return Settings(rounds=self.rounds, released_grid=self.released_grid)

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return self.settings.recipe(bits)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        calibrate_by_output_error(network, run, bits, self.settings)
        if self.trains:
            composition = Composition(
                losses=lambda unit: [Divergence(unit) if unit.is_head else _Tenth(unit)],
                trained=roundings_and_steps(self),
                mix_probability=self.mix_probability,
                drop_probability=self.drop_probability,
            )
            with _exact_powers(network):
                results = optimize_units(network, run, self, composition)
            run.report["modules"] = {name: asdict(result) for name, result in results.items()}
        for _, layer in network.weight_layers():
            fold_shift(layer)


class _Tenth(Loss):
    """A tenth of the squared error, which gives the regularizer of roundings ten times the weight."""

    def __call__(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss; see `Loss.__call__`."""
        return super().__call__(output, batch) / 10


@contextmanager
def _exact_powers(network: Network) -> Iterator[None]:
    """Let logarithmic quantizers have exact powers of their base inside the block."""
    found = [module for module in network.model.modules() if isinstance(module, AdaLogQuantizer)]
    try:
        for quantizer in found:
            quantizer.training_form = True
        yield
    finally:
        for quantizer in found:
            quantizer.training_form = False
