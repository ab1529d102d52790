"""GPTQ (ICLR 2023, arXiv 2210.17323): rounding errors of a weight's columns compensated by the columns after them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adfq.bits import Bits
from adfq.calibration import calibrate_activations
from adfq.calibration.grams import Gram, cholesky, grams_of_layers
from adfq.calibration.passes import naming
from adfq.errors import AdfqError
from adfq.layers import QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Recipe

INPUTS = ("asymmetric", "quantized", "full_precision")
ORDERS = ("activation", "index")

_BLOCK = 128  # columns whose errors reach the later ones together


@dataclass(frozen=True)
class GPTQ(Method):
    """GPTQ: uniform quantization as in base PTQ, with weights rounded column by column under XᵀX.

    Each rounding error is made up for by the columns that are not rounded yet. Activations are calibrated first, with
    weights in full precision. A convolution is one of its patches; one in groups, and a layer with more than 8192
    inputs, is rounded to nearest.

    Attributes:
        inputs: the inputs X of a layer. ``"full_precision"``: those of the network before quantization.
            ``"quantized"``: those of the network quantized so far, through the layer's input quantizer.
            ``"asymmetric"``: the same, with outputs in full precision as the aim (GPTAQ, arXiv 2504.02692); behind the
            trunk of the network it is ``"quantized"``.
        order: ``"activation"`` rounds the columns of the largest inputs first, ``"index"`` goes from the first to the
            last.
        damping: share of the mean diagonal of XᵀX that is added to the diagonal, above 0.
        correction: share of GPTAQ's correction, from 0 to 1; with ``"asymmetric"`` only. The default is that of its
            released code, the paper's formula has 1.
    """

    label = "GPTQ"
    paper = "arXiv 2210.17323"
    trains = "weights, in closed form"

    inputs: str = "asymmetric"
    order: str = "activation"
    damping: float = 0.01
    correction: float = 0.25

    def __post_init__(self) -> None:
        for name, value, known in (("inputs", self.inputs, INPUTS), ("order", self.order, ORDERS)):
            if value not in known:
                raise AdfqError(f"unknown {name} {value!r}; there are {', '.join(known)}")
        if not (isinstance(self.damping, (int, float)) and 0 < self.damping < math.inf):
            raise AdfqError(f"damping must be above 0, got {self.damping!r}")
        if not (isinstance(self.correction, (int, float)) and 0 <= self.correction <= 1):
            raise AdfqError(f"correction must be from 0 to 1, got {self.correction!r}")

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range="percentile"),
            weight=partial(UniformQuantizer, bits.weight, "row", "percentile"),
            activations={"patch_embed": partial(UniformQuantizer, 8, range="percentile")},
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        calibrate_activations(network, run.images)
        for name, layer, gram in grams_of_layers(network, run.images, self.inputs):
            with naming(f"{name}.weight"):
                layer.find_weight_range()
                if gram is not None:
                    layer.learned_weight = self.compensate(layer, gram)

    @torch.no_grad()
    def compensate(self, layer: QuantWeightLayer, gram: Gram) -> Tensor:
        """Return a layer's weight on the grid of its quantizer, in the weight's shape and dtype.

        Args:
            layer: layer with a calibrated weight quantizer.
            gram: sums over its inputs.

        Raises:
            AdfqError: for damping too small to invert XᵀX.
        """
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, UniformQuantizer)
        products = gram.products.clone()
        diagonal = products.diagonal()
        order = diagonal.argsort(descending=True) if self.order == "activation" else torch.arange(len(products))
        order = order.to(products.device)
        diagonal[diagonal == 0] = 1  # a channel that is 0 on all images has no effect on the others
        diagonal += self.damping * diagonal.mean()
        inverse = inverse_factor(products[order][:, order])
        correction = None
        if gram.differences is not None:
            ahead = (gram.differences.T[order][:, order] @ inverse.T).triu(1)
            correction = self.correction * ahead @ inverse
        grid = Grid.of(quantizer)
        columns = layer.weight.detach().flatten(1).double().T[order]
        codes = torch.empty_like(columns)
        codes[order] = round_columns(columns, grid, inverse, correction)
        return quantizer.decode(codes.T.contiguous().view(layer.weight.shape).to(torch.uint8)).to(layer.weight.dtype)


@dataclass(frozen=True)
class Grid:
    """The grid of each output channel of a weight.

    Attributes:
        scale: step sizes, m.
        zero_point: codes of 0, m: whole numbers.
        levels: number of codes.
    """

    scale: Tensor
    zero_point: Tensor
    levels: int

    @classmethod
    def of(cls, quantizer: UniformQuantizer) -> Grid:
        """Return the grid of a calibrated quantizer with a scale for each output channel."""
        return cls(quantizer.scale.flatten(), quantizer.zero_point.flatten(), quantizer.levels)

    def encode(self, column: Tensor) -> Tensor:
        """Return the codes of a column of the weight, m."""
        # In single precision, so that without compensation these are the codes of the quantizer itself.
        return column.float().div_(self.scale).round_().add_(self.zero_point).clamp_(0, self.levels - 1)


class AffineGrid(Grid):
    """A grid whose zero points are any real numbers."""

    def encode(self, column: Tensor) -> Tensor:
        """Return the codes of a column of the weight, m."""
        return column.float().div_(self.scale).add_(self.zero_point).round_().clamp_(0, self.levels - 1)


def inverse_factor(matrix: Tensor) -> Tensor:
    """Return the upper triangular U with UᵀU = matrix⁻¹."""
    factor = cholesky(matrix.flip(0, 1), "damping").flip(0, 1)  # upper, factor·factorᵀ = matrix
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse


def compensated_codes(columns: Tensor, products: Tensor, grid: Grid) -> Tensor:
    """Return codes of a weight's columns, those of the largest inputs rounded first: n×m, double precision.

    Args:
        columns: the weight transposed, n×m, double precision.
        products: positive definite XᵀX, n×n.
        grid: grid of each output channel.
    """
    order = products.diagonal().argsort(descending=True)
    codes = torch.empty_like(columns)
    codes[order] = round_columns(columns[order], grid, inverse_factor(products[order][:, order]))
    return codes


def round_columns(columns: Tensor, grid: Grid, inverse: Tensor, correction: Tensor | None = None) -> Tensor:
    """Return codes of a weight's columns, rounded one after the other: n×m, double precision.

    Args:
        columns: the weight transposed, n×m, double precision; overwritten.
        grid: grid of each output channel.
        inverse: upper Cholesky factor of the inverse of XᵀX, n×n.
        correction: GPTAQ's P, strictly upper triangular, n×n; None, the default, for none.
    """
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), _BLOCK):
        block = slice(start, start + _BLOCK)
        rest = slice(start + _BLOCK, None)
        errors, weights = torch.empty_like(columns[block]), torch.empty_like(columns[block])
        for index, (within, shares) in enumerate(zip(columns[block], inverse[block, block], strict=True)):
            code = grid.encode(within)
            codes[start + index] = code
            weights[index] = within
            errors[index] = (within - (code - grid.zero_point) * grid.scale) / shares[index]
            later = columns[block][index + 1 :]
            later.addr_(shares[index + 1 :], errors[index], alpha=-1)
            if correction is not None:
                later.addr_(correction[start + index, block][index + 1 :], weights[index])
        columns[rest] -= inverse[block, rest].T @ errors
        if correction is not None:
            columns[rest] += correction[block, rest].T @ weights
    return codes
