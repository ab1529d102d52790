"""Row-Ridge, a method of this project: a uniform grid for each row, weights by ridge regression and compensation."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adfq.bits import Bits
from adfq.calibration import calibrate_activations
from adfq.calibration.grams import Gram, cholesky, grams_of_layers
from adfq.calibration.passes import naming
from adfq.errors import AdfqError
from adfq.layers import QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import AffineUniformQuantizer, UniformQuantizer
from adfq.sites import Network, Recipe
from adfq.transforms.positions import has_columns, sites_with_fixed_positions
from baselines.gptq import AffineGrid, compensated_codes


@dataclass(frozen=True)
class RowRidge(Method):
    """Row-Ridge: static uniform grids for each row, weights and biases in closed form on the quantized inputs.

    An activation has a step size for each token position, an operand of attention one for each head and position, and
    `value` one for each head and channel: whatever an integer matrix product can take out of its sum. A layer whose
    positions differ between images has one step size. Weights are the ridge regression of full precision's outputs on
    the quantized inputs behind all layers that are quantized already, rounded column by column under the same
    regression. A convolution is one of its patches; one in groups, and a layer with more than 8192 inputs, is rounded
    to nearest.

    Attributes:
        penalty: pull of the regression towards the weight in full precision, in units of the mean square of an input
            about its mean, above 0.
        positions: False has one step size for all positions, and one for each head of an operand of attention.
        regression: False rounds the weights in full precision, with the same compensation.
        compensation: False rounds to nearest.

    Raises:
        AdfqError: for a penalty out of range.
    """

    label = "Row-Ridge"
    trains = "weights, in closed form"
    calibration_size = 128

    penalty: float = 1.0
    positions: bool = True
    regression: bool = True
    compensation: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.penalty, (int, float)) and 0 < self.penalty < math.inf):
            raise AdfqError(f"penalty must be above 0, got {self.penalty!r}")

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        operand = partial(AffineUniformQuantizer, bits.activation, "head")
        return Recipe(
            activation=partial(AffineUniformQuantizer, bits.activation, zero="shared"),
            weight=partial(AffineUniformQuantizer, bits.weight, "row"),
            activations={
                "patch_embed": partial(UniformQuantizer, 8, range="percentile"),
                **dict.fromkeys(("query", "key", "value"), operand),
                "probs": partial(operand, zero="lowest"),
            },
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        parts = network.trunk if self.positions else ()
        for site, _ in sites_with_fixed_positions(network, run.images, parts):
            if isinstance(quantizer := site.quantizer, AffineUniformQuantizer):
                quantizer.granularity = "head_channel" if has_columns(site) else "patch"
        teacher = copy.deepcopy(network)  # biases change on the way
        calibrate_activations(network, run.images)
        for name, layer, gram in grams_of_layers(network, run.images, "asymmetric", teacher):
            with naming(f"{name}.weight"):
                if gram is None or not gram.products.diagonal().any():
                    layer.find_weight_range()
                else:
                    self.fit(layer, gram)

    @torch.no_grad()
    def fit(self, layer: QuantWeightLayer, gram: Gram) -> None:
        """Give a layer the weight and bias that reproduce outputs in full precision from quantized inputs.

        Args:
            layer: layer with a weight quantizer, which is calibrated here.
            gram: sums over its quantized inputs, with differences from those in full precision.

        Raises:
            NonFiniteError: for a weight that holds NaN or infinity.
        """
        quantizer, shape = layer.weight_quantizer, layer.weight.shape
        assert isinstance(quantizer, AffineUniformQuantizer)
        weight = layer.weight.detach().flatten(1).double()
        moments = Moments.of(gram, centred=layer.bias is not None)
        penalty = self.penalty * moments.products.diagonal().mean()
        moments.products.diagonal().add_(penalty)
        moments.targets.diagonal().add_(penalty)
        fitted = weight.T
        if self.regression:
            fitted = torch.cholesky_solve(moments.targets @ fitted, cholesky(moments.products, "penalty"))
        wanted = fitted.T.reshape(shape).float()
        quantizer.calibrate(wanted)
        codes = quantizer.encode(wanted)
        if self.compensation:
            compensated = compensated_codes(fitted, moments.products, AffineGrid.of(quantizer))
            codes = compensated.T.reshape(shape).to(torch.uint8)
        quantized = quantizer.decode(codes)
        layer.learned_weight = quantized.to(layer.weight.dtype)
        if layer.bias is not None:
            moved = weight @ moments.target_mean - quantized.flatten(1).double() @ moments.mean
            layer.bias = nn.Parameter((layer.bias + moved).to(layer.bias.dtype), requires_grad=False)


class Moments(NamedTuple):
    """Second moments of a layer's quantized inputs X̂ and of those in full precision X, in double precision.

    Attributes:
        products: X̂ᵀX̂/N, n×n.
        targets: X̂ᵀX/N, n×n.
        mean: mean of X̂, n.
        target_mean: mean of X, n.
    """

    products: Tensor
    targets: Tensor
    mean: Tensor
    target_mean: Tensor

    @classmethod
    def of(cls, gram: Gram, centred: bool) -> Moments:
        """Return the moments of a layer's inputs.

        Args:
            gram: sums over N rows; without differences X is X̂.
            centred: True for moments about the means, where a bias makes up for these.
        """
        products, mean = gram.products / gram.rows, gram.sums / gram.rows
        targets, target_mean = products.clone(), mean
        if gram.differences is not None and gram.difference_sums is not None:
            targets += gram.differences / gram.rows
            target_mean = mean + gram.difference_sums / gram.rows
        if centred:
            products -= mean[:, None] * mean
            targets -= mean[:, None] * target_mean
        return cls(products, targets, mean, target_mean)
