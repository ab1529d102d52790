"""Outputs of LayerNorms whose channels have mean 0 and less different spreads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from adfq.calibration import CalibrationImages
from adfq.sites import POST_NORM_ROLES, Network
from adfq.transforms.reparameterization import NormGroup, norms_with_readers


@torch.no_grad()
def standardize_norms(network: Network, images: CalibrationImages, importance: Mapping[str, Sequence[Tensor]]) -> None:
    """Move the means of channels, and half of the differences between their spreads, out of the LayerNorms.

    The layers that read a LayerNorm have it in their biases and weights from then on, and the network computes the same
    as before. Half of the differences means the square root of the ratio of two standard deviations. A LayerNorm with
    other readers, or without a bias, stays.

    Args:
        network: network with quantizers that are not yet calibrated, or without.
        images: calibration images; the moments are those in full precision.
        importance: by the name of a layer, weights of the rows of one use in a batch after the other
            (`adfq.reconstruction.importance_of_rows`); a layer that is not there has equal ones.
    """
    groups = norms_with_readers(network, POST_NORM_ROLES)
    readers = {layer for group in groups for layer in group.layers}
    moments = {layer: Moments(importance.get(name)) for name, layer in network.weight_layers() if layer in readers}
    hooks = [layer.register_forward_pre_hook(partial(_observe, found)) for layer, found in moments.items()]
    try:
        with network.full_precision():
            for batch in images:
                network.run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for group in groups:
        found = [moments[layer] for layer in group.layers if moments[layer].total]
        if found:  # the model uses these layers
            total = sum(own.total for own in found)
            mean = torch.stack([own.sum for own in found]).sum(0) / total
            square = torch.stack([own.squares for own in found]).sum(0) / total
            standardize(group, mean, (square - mean.square()).clamp(min=0).sqrt())


class Moments:
    """The first two moments of a layer's input rows, in double precision.

    Args:
        weights: weights of the rows of one use of the layer after the other; None for equal ones.

    Attributes:
        sum: sum of the weighted rows.
        squares: sum of their weighted squares.
        total: sum of the weights.
    """

    def __init__(self, weights: Sequence[Tensor] | None) -> None:
        self.weights = None if weights is None else iter(weights)
        self.sum = self.squares = torch.zeros((), dtype=torch.float64)
        self.total = 0.0

    def update(self, x: Tensor) -> None:
        """Take in a layer's input, whose last dimension is that of channels."""
        rows = x.flatten(0, -2).double()
        weights = rows.new_ones(len(rows)) if self.weights is None else next(self.weights).flatten().double()
        self.sum = self.sum.to(rows.device) + weights @ rows
        self.squares = self.squares.to(rows.device) + weights @ rows.square()
        self.total += float(weights.sum())


def _observe(moments: Moments, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    moments.update(inputs[0])


@torch.no_grad()
def standardize(group: NormGroup, mean: Tensor, deviation: Tensor) -> None:
    """Give a LayerNorm's output x the form (x - mean)/r, and its readers the rest, with r ∝ √deviation.

    Args:
        group: the LayerNorm and its readers.
        mean: C.
        deviation: standard deviations, C; a channel whose deviation is next to nothing keeps r = 1.
    """
    norm, layers, padding = group
    live = deviation > torch.finfo(torch.float32).eps * deviation.max()
    ratio = torch.ones_like(deviation)
    ratio[live] = (deviation[live].log() - deviation[live].log().mean()).div(2).exp()
    norm.weight.copy_(norm.weight / ratio)
    for offset in (norm.bias, padding):
        if offset is not None:
            offset.copy_((offset - mean) / ratio)
    for layer in layers:
        weight, moved = layer.weight.double(), layer.weight.double() @ mean
        bias = moved if layer.bias is None else layer.bias + moved
        layer.weight, layer.bias = (
            nn.Parameter(changed.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
            for changed in (weight * ratio, bias)
        )
