"""FIMA-Q (CVPR 2025, arXiv 2506.11543): blocks reconstructed under a Fisher information of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.method import Run
from adfq.output_error import APHQ, Settings, calibrate_by_output_error
from adfq.reconstruction import (
    Composition,
    Divergence,
    Loss,
    RoundingMethod,
    Unit,
    optimize_units,
    roundings_and_steps,
)
from adfq.reconstruction.fisher import LowRankFisher
from adfq.sites import Network, Recipe
from adfq.transforms.positions import spread_scales

_TEMPERATURE = 20.0


@dataclass(frozen=True)
class FIMAQ(RoundingMethod):
    """FIMA-Q: calibration by output errors, block reconstruction by a diagonal and low-rank Fisher information.

    The calibration is that of APHQ-ViT, with GELU kept. Step sizes are then learned for each token, and in matrix
    products for each head and token; zero points stay shared. For images of several sizes, and so outputs of several
    shapes, the loss is the squared error.

    Attributes:
        rank: number of pairs that make up the Fisher information (`adfq.reconstruction.fisher.LowRankFisher`).
        token_scales: False keeps one step size for all tokens.
        released_grid: True for the released code's candidates above 4 bits.

    Raises:
        AdfqError: for a value out of range.
    """

    label = "FIMA-Q"
    paper = "arXiv 2506.11543"
    calibration_size = 1024

    rank: int = 5
    token_scales: bool = True
    released_grid: bool = False
    iterations: int = 20000
    drop_probability: float = 0.5
    rounding_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise AdfqError(f"rank must be at least 1, got {self.rank}")

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return self._settings().recipe(bits)

    def _settings(self) -> Settings:
        return replace(APHQ, released_grid=self.released_grid)

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        calibrate_by_output_error(network, run, bits, self._settings())
        if not self.iterations:
            return
        if self.token_scales:
            with torch.no_grad():
                spread_scales(network, run.images)
        composition = Composition(
            losses=self._losses,
            trained=roundings_and_steps(self),
            mix_probability=self.mix_probability,
            drop_probability=self.drop_probability,
            keeps_all=True,  # its loss is no distance that two states could be compared by
        )
        results = optimize_units(network, run, self, composition)
        run.report["modules"] = {name: asdict(result) for name, result in results.items()}

    def _losses(self, unit: Unit) -> Sequence[Loss]:
        if unit.is_head:
            return [Divergence(unit)]
        return [LowRankFisher(unit, self.rank, _TEMPERATURE) if len(unit.examples) == 1 else Loss(unit)]
