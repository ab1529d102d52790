"""Inputs of layers whose channels have mean 0 and less different spreads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adfq.calibration import CalibrationImages
from adfq.layers import QuantWeightLayer
from adfq.sites import POST_NORM_ROLES, Network
from adfq.transforms.activations import scale_activation
from adfq.transforms.relu import gelu_mlps, linears_of
from adfq.transforms.reparameterization import NormGroup, norms_with_readers
from adfq.transforms.shared import shared_parameter, weight_layer


@torch.no_grad()
def standardize_inputs(network: Network, images: CalibrationImages, importance: Mapping[str, Sequence[Tensor]]) -> None:
    """Move the means of channels, and half of the differences between their spreads, out of the inputs of layers.

    Half of the differences means the square root of the ratio of two standard deviations. The network computes the same
    as before. Behind a LayerNorm its affine part takes the change, and the layers that read it have the rest in their
    biases and weights. Outputs of the heads of an attention change with the values: attention adds up to 1, so that
    what is taken off every value is off the output too. The GELU of an MLP has factors for its channels behind it
    (`ScaledActivation`), and keeps its means. A LayerNorm with other readers, or without a bias, stays. So does an
    attention with something between values and output layer, and an MLP with something between GELU and last layer.

    Args:
        network: network with quantizers that are not yet calibrated, or without.
        images: calibration images; the moments are those in full precision.
        importance: by the name of a layer, weights of the rows of one use in a batch after the other
            (`adfq.reconstruction.importance_of_rows`); a layer that is not there has equal ones.
    """
    groups = norms_with_readers(network, POST_NORM_ROLES)
    attentions = [
        (weight_layer(network.model, heads.qkv), weight_layer(network.model, heads.proj))
        for heads in network.heads
        if not heads.value and not shared_parameter(network.model, heads.parameters)
    ]
    mlps = {name: linears_of(network.model.get_submodule(name))[1] for name in _plain_mlps(network, images)}
    readers = {layer for group in groups for layer in group.layers} | {proj for _, proj in attentions}
    readers |= set(mlps.values())
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
            standardize_norm(group, *_spread(found))
    for qkv, proj in attentions:
        if moments[proj].total:
            standardize_values(qkv, proj, *_spread([moments[proj]]))
    for name, layer in mlps.items():
        mean, deviation = _spread([moments[layer]])
        scaled = scale_activation(network.model, name)
        scaled.ratio.copy_(_ratio(deviation))
        _give_rest(layer, torch.zeros_like(mean), scaled.ratio)


def _plain_mlps(network: Network, images: CalibrationImages) -> list[str]:
    """Return the names of the MLPs whose last layer reads what their GELU gives, each time."""
    outputs: dict[str, Any] = {}
    plain: dict[str, bool] = {}

    def compare(name: str, found: Tensor) -> None:
        plain[name] = plain.get(name, True) and found is outputs.pop(name, None)

    with ExitStack() as hooks, network.full_precision():
        for name in gelu_mlps(network):
            mlp: Any = network.model.get_submodule(name)
            keep = mlp.act.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output}))
            last = linears_of(mlp)[1].register_forward_pre_hook(lambda _, inputs, name=name: compare(name, inputs[0]))
            hooks.callback(keep.remove)
            hooks.callback(last.remove)
        for image in images.one_of_each_shape():
            network.run(image)
    return [name for name, found in plain.items() if found]


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


def _spread(moments: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of channels, over the rows of all moments."""
    total = sum(own.total for own in moments)
    mean = torch.stack([own.sum for own in moments]).sum(0) / total
    square = torch.stack([own.squares for own in moments]).sum(0) / total
    return mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def standardize_norm(group: NormGroup, mean: Tensor, deviation: Tensor) -> None:
    """Give a LayerNorm's output x the form (x - mean)/r, and its readers the rest, with r ∝ √deviation.

    Args:
        group: the LayerNorm and its readers.
        mean: C.
        deviation: standard deviations, C; a channel whose deviation is next to nothing keeps r = 1.
    """
    norm, layers, padding = group
    ratio = _ratio(deviation)
    norm.weight.copy_(norm.weight / ratio)
    for offset in (norm.bias, padding):
        if offset is not None:
            offset.copy_((offset - mean) / ratio)
    for layer in layers:
        _give_rest(layer, mean, ratio)


@torch.no_grad()
def standardize_values(qkv: QuantWeightLayer, proj: QuantWeightLayer, mean: Tensor, deviation: Tensor) -> None:
    """Give the values v of an attention the form (v - mean)/r, and its output layer the rest, with r ∝ √deviation.

    Args:
        qkv: layer whose outputs are queries, keys and values, C each.
        proj: layer whose inputs are the outputs of the heads, C.
        mean: means of these inputs, C.
        deviation: their standard deviations, C; see `standardize_norm`.
    """
    ratio, (first, last) = _ratio(deviation), qkv.weight.double().tensor_split([len(qkv.weight) // 3 * 2])
    bias = torch.zeros(len(qkv.weight)).to(first) if qkv.bias is None else qkv.bias.double()
    kept, moved = bias.tensor_split([len(first)])
    _set(qkv, torch.cat((first, last / ratio[:, None])), torch.cat((kept, (moved - mean) / ratio)))
    _give_rest(proj, mean, ratio)


def _ratio(deviation: Tensor) -> Tensor:
    live = deviation > torch.finfo(torch.float32).eps * deviation.max()
    ratio = torch.ones_like(deviation)
    ratio[live] = (deviation[live].log() - deviation[live].log().mean()).div(2).exp()
    return ratio


def _give_rest(layer: QuantWeightLayer, mean: Tensor, ratio: Tensor) -> None:
    """Let a layer compute from (x - mean)/ratio the same as before from x."""
    weight, moved = layer.weight.double(), layer.weight.double() @ mean
    _set(layer, weight * ratio, moved if layer.bias is None else layer.bias + moved)


def _set(layer: QuantWeightLayer, weight: Tensor, bias: Tensor) -> None:
    layer.weight, layer.bias = (
        nn.Parameter(changed.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        for changed in (weight, bias)
    )
