"""Bias reparameterization of AdaLog (arXiv 2407.12951): a shift of an input moves into the layer's bias."""

from __future__ import annotations

import torch
from torch import nn

from adfq.layers import QuantWeightLayer
from adfq.quantizers import AdaLogQuantizer


@torch.no_grad()
def fold_shift(layer: QuantWeightLayer) -> None:
    """Move the shift of a layer's input quantizer into the layer's bias (bias reparameterization).

    The layer computes the same as before: its quantizer gives x̂ + shift, and its bias is lower by shift times the sum
    of each row of the quantized weight. Weights must not change afterwards.

    Args:
        layer: layer with a calibrated weight. Nothing happens unless its input quantizer is an `AdaLogQuantizer` with a
            shift that is not folded.
    """
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, AdaLogQuantizer) or not quantizer.shift or quantizer.folded:
        return
    moved = quantizer.shift * layer.effective_weight().double().flatten(1).sum(1)
    bias = -moved if layer.bias is None else layer.bias.double() - moved
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    quantizer.folded = True
