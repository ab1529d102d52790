"""Settings of the search for quantizers by a layer's output error."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from adfq.bits import Bits
from adfq.errors import AdfqError
from adfq.quantizers import AdaLogQuantizer, UniformQuantizer
from adfq.quantizers.twin import GELU_DEPTH
from adfq.sites import MakeQuantizer, Recipe


@dataclass(frozen=True)
class Settings:
    """Settings of the search: grids, refinement, rounds, quantizers. The default ones are AdaLog's.

    Attributes:
        ends: True to search for both ends of the ranges of matrix products' operands and of the patch embedding's
            weight, as APHQ-ViT does; False for widths and zero points.
        steps: refinements of scales in each search (FPCS); 0 for none.
        rounds: number of searches of both operands by the output's error.
        log_probs: True for the adaptive logarithmic quantizer of probabilities, False for uniform ones per head.
        log_fc2: True for the shifted adaptive logarithmic quantizer behind a GELU, False for a uniform one.
        released_grid: True for the released codes' zero points at more than 16 levels.
        narrow: True for half of the zero points (at most 16) in weights and matrix products, as AdaLog does.

    Raises:
        AdfqError: for less than one round, or a negative number of steps.
    """

    ends: bool = False
    steps: int = 5
    rounds: int = 3
    log_probs: bool = True
    log_fc2: bool = True
    released_grid: bool = False
    narrow: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 0:
            raise AdfqError("rounds must be at least 1, and steps at least 0")

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role.

        Args:
            bits: bit-widths of weights and activations.
        """
        per_head = partial(UniformQuantizer, bits.activation, "head", "percentile")
        activations: dict[str, MakeQuantizer] = {"patch_embed": lambda: None}
        activations |= dict.fromkeys(("query", "key", "value", "probs"), per_head)
        if self.log_probs:
            activations["probs"] = partial(AdaLogQuantizer, bits.activation)
        if self.log_fc2:
            activations["fc2"] = partial(AdaLogQuantizer, bits.activation, GELU_DEPTH)
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range="percentile"),
            weight=partial(UniformQuantizer, bits.weight, "row", "percentile"),
            activations=activations,
        )

    def weight_zero_points(self, levels: int) -> int:
        """Return the number of zero points of a linear layer's weight at 16 levels and below."""
        return min(16, levels // 2 if self.narrow else levels)

    def input_zero_points(self, levels: int) -> int:
        """Return the number of zero points of a linear layer's input."""
        return min(16, levels)

    def operand_zero_points(self, levels: int) -> int:
        """Return the number of zero points of a matrix product's operand."""
        return min(16, levels // 2)

    def patch_embedding_zero_points(self, levels: int) -> int:
        """Return the number of zero points of a patch embedding's weight."""
        return levels // 2


#: The calibration of APHQ-ViT and FIMA-Q.
APHQ = Settings(ends=True, steps=0, log_probs=False, log_fc2=False, narrow=False)
