"""GPTQ (ICLR 2023, arXiv 2210.17323): rounding errors of a weight's columns compensated by the columns after them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adfq.bits import Bits
from adfq.calibration import calibrate_activations
from adfq.calibration.compensation import Grid, inverse_factor, round_columns
from adfq.calibration.grams import Gram, grams_of_layers
from adfq.calibration.passes import naming
from adfq.errors import AdfqError
from adfq.layers import QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import UniformQuantizer
from adfq.reconstruction.options import check_number
from adfq.sites import Network, Recipe

INPUTS = ("asymmetric", "quantized", "full_precision")
ORDERS = ("activation", "index")


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
        check_number(self, "damping", positive=True)
        check_number(self, "correction", 1.0)

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
