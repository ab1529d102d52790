"""ERQ (TPAMI 2025, arXiv 2407.06794): errors of activations and weights made up for by ridge regressions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adfq.bits import Bits
from adfq.calibration import calibrate_activations
from adfq.calibration.grams import Gram, grams_of_layers
from adfq.calibration.passes import naming
from adfq.layers import QuantConv2d, QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import DualUniformQuantizer, LogQuantizer, UniformQuantizer
from adfq.reconstruction.options import check_number
from adfq.sites import Network, Recipe
from adfq.transforms.reparameterization import norms_with_readers, reparameterize
from baselines.erq.regression import (
    Grid,
    correct_activation_error,
    correct_weight_error,
    second_moments,
    values_of,
    with_ones,
)

REPARAMETERIZED = ("qkv", "fc1")

_CALIBRATED = 32  # images that ranges of activations are found on, as in the released code
_FLAT_PENALTY = 0.1  # λ of Aqer for inputs of two dimensions, such as a classifier's


@dataclass(frozen=True)
class ERQ(Method):
    """ERQ: ridge regressions on top of scale reparameterization, first for activations (Aqer), then for weights (Wqer).

    The image stays in full precision, attention after softmax is quantized in base √2. A layer's two regressions take
    its inputs in full precision and the same through its own input quantizer, so that they depend on no other layer. A
    convolution has the second one only. One in groups, and a layer with more than 8192 inputs, is rounded to nearest.
    A layer whose LayerNorm has readers of another kind or no bias is per tensor from the start.

    Attributes:
        coe: ten times the penalty λ of the regressions; a convolution has the penalty coe. Sums are over all rows, so
            that the same coe weighs less with more images.
        outlier_share: number of input columns of `qkv` and `fc1` with a grid of their own, as a share of the number of
            output channels.
    """

    label = "ERQ"
    paper = "arXiv 2407.06794"
    trains = "weights, in closed form"

    coe: float = 20000.0
    outlier_share: float = 0.05

    def __post_init__(self) -> None:
        check_number(self, "coe", positive=True)
        DualUniformQuantizer(8, self.outlier_share)  # raises for a share that it cannot have

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        dual = partial(DualUniformQuantizer, bits.weight, self.outlier_share)
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range="percentile"),
            weight=partial(UniformQuantizer, bits.weight, "row", "percentile10"),
            activations={"patch_embed": lambda: None, "probs": partial(LogQuantizer, bits.activation)},
            weights=dict.fromkeys(REPARAMETERIZED, dual),
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        groups = norms_with_readers(network, REPARAMETERIZED)
        for layer in (layer for group in groups for layer in group.layers):
            layer.input_quantizer = UniformQuantizer(bits.activation, "channel", "percentile")
        calibrate_activations(network, run.images.first(_CALIBRATED))
        for group in groups:
            reparameterize(*group)
        biases: list[tuple[QuantWeightLayer, Tensor]] = []  # full precision has the old ones until all is done
        for name, layer, gram in grams_of_layers(network, run.images, "own"):
            with naming(f"{name}.weight"):
                if gram is None:
                    layer.find_weight_range()
                    continue
                layer.learned_weight, bias = self.correct(layer, gram)
            if bias is not None:
                biases.append((layer, bias))
        for layer, bias in biases:
            layer.bias = nn.Parameter(bias)

    @torch.no_grad()
    def correct(self, layer: QuantWeightLayer, gram: Gram) -> tuple[Tensor, Tensor | None]:
        """Return a layer's weight on the grid of its quantizer, which is calibrated here, and its new bias.

        Args:
            layer: layer with a weight quantizer.
            gram: sums over its quantized inputs, with differences from those in full precision.

        Raises:
            AdfqError: for a penalty too small to invert the Gram matrix.
            NonFiniteError: for a weight that holds NaN or infinity.
        """
        quantizer, shape = layer.weight_quantizer, layer.weight.shape
        assert isinstance(quantizer, (UniformQuantizer, DualUniformQuantizer))
        values = values_of(layer)
        products, differences = with_ones(gram, layer.bias is not None)
        size = layer.weight[0].numel()
        convolution = isinstance(layer, QuantConv2d)
        penalty = self.coe if convolution else self.coe / 10
        if not convolution:
            values = correct_activation_error(values, products, differences, _FLAT_PENALTY if gram.is_flat else penalty)
        quantizer.calibrate(values[:, :size].reshape(shape))
        moments = None if convolution else second_moments(gram)
        values = correct_weight_error(values, Grid.of(quantizer, size), products, penalty, moments)
        weight = quantizer.decode(quantizer.encode(values[:, :size].reshape(shape))).to(layer.weight.dtype)
        bias = None if layer.bias is None else values[:, size].to(layer.bias.dtype)
        return weight, bias
