"""Row-Ridge, a method of this project: a uniform grid for each row, weights by ridge regression and compensation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adfq.bits import Bits
from adfq.calibration import calibrate_activations
from adfq.calibration.compensation import AffineGrid, compensated_codes
from adfq.calibration.grams import Gram, cholesky, grams_of_layers
from adfq.calibration.passes import naming
from adfq.layers import QuantWeightLayer
from adfq.method import Run
from adfq.quantizers import AffineUniformQuantizer, NumeratorQuantizer, UniformQuantizer
from adfq.reconstruction import (
    Composition,
    Divergence,
    Loss,
    OptimizingMethod,
    SuffixFeature,
    Unit,
    importance_of_rows,
    optimize_units,
)
from adfq.reconstruction.options import check_number
from adfq.reconstruction.trained import Steps, Trained, Weights
from adfq.sites import Network, Recipe
from adfq.transforms.positions import has_columns, sites_with_fixed_positions
from adfq.transforms.standardization import standardize_inputs

_LEAST = 1e-12  # least penalty, in units of the mean square of an input: inputs may be the same in all rows
_WITHIN = 0.45  # steps that a weight starts off its code at most


@dataclass(frozen=True)
class RowRidge(OptimizingMethod):
    """Row-Ridge: static uniform grids for each row, weights and biases in closed form on the quantized inputs.

    An activation has a step size for each token position, an operand of attention one for each head and position, and
    `value` one for each head and channel: whatever an integer matrix product can take out of its sum. A layer whose
    positions differ between images has one step size. Attention is rounded before the softmax's division. Weights are
    the ridge regression of full precision's outputs on the quantized inputs behind all layers that are quantized
    already, rounded column by column under the same regression. A convolution is one of its patches; one in groups,
    and a layer with more than 8192 inputs, is rounded to nearest.

    Attributes:
        iterations: iterations of each block with `reconstruct`.
        optimize_batch_size: images in an iteration.
        penalty: pull of the regression towards the weight in full precision, in units of the mean square of an input
            about its mean, above 0.
        importance: False gives every row of a layer the same weight in sums over rows.
        standardized: False leaves means and spreads of channels in the inputs of layers.
        numerators: False rounds attention behind the softmax's division, with a step size for each head and position.
        positions: False has one step size for all positions, and one for each head of an operand of attention.
        regression: False rounds the weights in full precision, with the same compensation.
        compensation: False rounds to nearest.
        reconstruct: True trains each block afterwards, straight through the rounding and on the quantized network's
            inputs, so that the feature before the classifier is that of full precision
            (`adfq.reconstruction.SuffixFeature`).
        local_weight: weight of the block's own error beside the feature's, above 0.
        weight_travel: iterations times learning rate of weights and biases (Adam, cosine to 0), in step sizes of the
            weight.
        step_travel: iterations times learning rate of activation step sizes (Adam, cosine to 0), in step sizes; the
            rate is limited to a hundredth.

    Raises:
        AdfqError: for a value out of range.
    """

    label = "Row-Ridge"
    calibration_size = 128

    iterations: int = 50
    optimize_batch_size: int = 16
    penalty: float = 1.0
    importance: bool = True
    standardized: bool = True
    numerators: bool = True
    positions: bool = True
    regression: bool = True
    compensation: bool = True
    reconstruct: bool = False
    local_weight: float = 2.0
    weight_travel: float = 1.0
    step_travel: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_travel", "step_travel"):
            check_number(self, name)
        for name in ("local_weight", "penalty"):
            check_number(self, name, positive=True)

    @property
    def trains(self) -> str:
        """Weights, in closed form; weights and step sizes with iterations."""
        return "weights, step sizes" if self.reconstruct and self.iterations else "weights, in closed form"

    @property
    def trained_iterations(self) -> int:
        """Iterations of a block."""
        return self.iterations if self.reconstruct else 0

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        # Few keys and values that lie far off are what attention looks at: cutting them off costs more than elsewhere.
        operand = partial(AffineUniformQuantizer, bits.activation, "head", exponent=4.0)
        divided = partial(AffineUniformQuantizer, bits.activation, "head", zero="shared")
        return Recipe(
            activation=partial(AffineUniformQuantizer, bits.activation, zero="shared"),
            weight=partial(AffineUniformQuantizer, bits.weight, "row"),
            activations={
                "patch_embed": partial(UniformQuantizer, 8, range="percentile"),
                **dict.fromkeys(("query", "key", "value"), operand),
                "probs": partial(NumeratorQuantizer, bits.activation) if self.numerators else divided,
            },
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        parts = network.trunk if self.positions else ()
        for site, _ in sites_with_fixed_positions(network, run.images, parts):
            if isinstance(quantizer := site.quantizer, AffineUniformQuantizer):
                quantizer.granularity = "head_channel" if has_columns(site) else "patch"
        importance = importance_of_rows(network, run.images) if self.importance else {}
        if self.standardized:
            standardize_inputs(network, run.images, importance)
        teacher = copy.deepcopy(network)  # biases change on the way
        calibrate_activations(network, run.images)
        for name, layer, gram in grams_of_layers(network, run.images, "asymmetric", teacher, importance):
            with naming(f"{name}.weight"):
                if gram is None or not gram.products.diagonal().any():
                    layer.find_weight_range()
                else:
                    self.fit(layer, gram)
        if self.reconstruct and self.iterations:
            composition = Composition(losses=self._losses, trained=self._trained, mix_probability=1.0)
            results = optimize_units(network, run, self, composition, teacher)
            run.report["modules"] = {name: asdict(result) for name, result in results.items()}

    def _losses(self, unit: Unit) -> Sequence[Loss]:
        return [Divergence(unit) if unit.is_head else SuffixFeature(unit, self.local_weight)]

    def _trained(self, unit: Unit) -> Sequence[Trained]:
        weights = Weights(unit, self.weight_travel / self.iterations, self.iterations, relative=True)
        return [weights, Steps(unit, self.step_travel / self.iterations, self.iterations, relative=True)]

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
        mean_square = gram.products.diagonal().mean() / gram.rows
        penalty = torch.maximum(self.penalty * moments.products.diagonal().mean(), _LEAST * mean_square)
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
        if self.reconstruct:  # training starts where the weight is rounded to the same codes
            within = (wanted - quantized).clamp(-_WITHIN * quantizer.scale, _WITHIN * quantizer.scale)
            layer.weight, layer.learned_weight = nn.Parameter((quantized + within).to(layer.weight.dtype)), None
        if layer.bias is not None:
            moved = weight @ moments.target_mean - quantized.flatten(1).double() @ moments.mean
            layer.bias = nn.Parameter((layer.bias.detach() + moved).to(layer.bias.dtype))


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
