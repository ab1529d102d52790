"""Rotation and centring of residual streams, with the affine parts of LayerNorms folded into the layers behind them.

LayerNorm stays a LayerNorm: an orthogonal R with R·1 = 1 keeps the mean of a row, so that LN(x·R) = LN(x)·R without the
affine part. Source: SliceGPT, arXiv 2401.15024, and GLF-Q, arXiv 2609.34564, which take LayerNorm to RMSNorm instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adfq.errors import AdfqError
from adfq.layers import QuantWeightLayer
from adfq.plain import problem_of
from adfq.sites import Network
from adfq.streams import Stream
from adfq.transforms.shared import shared_parameter, weight_layer

_EXACT = 1e-9  # greatest error of an orthogonal matrix's products


class MappedNorm(nn.Module):
    """A LayerNorm with a linear map behind it, in the place of one whose output leaves a rotated stream.

    Input and output …×C.

    Args:
        norm: the LayerNorm.

    Attributes:
        norm: the LayerNorm.
        weight: C×C, in full precision whatever the method; the identity until a stream is rotated.
        bias: C.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm
        like = next(norm.parameters(), torch.empty(0))
        (width,) = norm.normalized_shape
        self.weight = nn.Parameter(torch.eye(width, dtype=like.dtype, device=like.device))
        self.bias = nn.Parameter(torch.zeros(width, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mapped output of the norm.

        Args:
            x: …×C.
        """
        return F.linear(self.norm(x), self.weight, self.bias)


def map_norm(model: nn.Module, name: str) -> MappedNorm:
    """Put a `MappedNorm` in the place of a LayerNorm, and return it.

    Args:
        model: an adapted model.
        name: name of the LayerNorm.

    Raises:
        AdfqError: for a module that is no plain LayerNorm over one dimension.
    """
    norm = dict(model.named_modules()).get(name)
    if not isinstance(norm, nn.LayerNorm) or problem_of(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        raise AdfqError(f"{name} is no LayerNorm over channels")
    mapped = MappedNorm(norm)
    model.set_submodule(name, mapped)
    return mapped


def mapped_norms(model: nn.Module) -> list[str]:
    """Return the names of the LayerNorms with a map behind them.

    Args:
        model: any model.
    """
    return [name for name, module in model.named_modules() if isinstance(module, MappedNorm)]


def stream_problem(network: Network, stream: Stream) -> str | None:
    """Return the reason why a stream cannot be rotated; None where it can.

    Args:
        network: an adapted model.
        stream: stream of it.
    """
    modules = dict(network.model.named_modules())
    for name, module in modules.items():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook, which may read the stream"
    for name, layers in stream.norms.items():
        if problem := problem_of(modules[name], nn.LayerNorm):
            return f"{name} is {problem}"
        if not layers and modules[name].normalized_shape != (stream.width,):
            return f"{name}, which something else than a layer reads, is over several tokens"
        paddings = [network.input_paddings[layer] for layer in layers if layer in network.input_paddings]
        gamma = modules[name].weight
        if paddings and gamma is not None and not gamma.all():
            return f"{name} has a weight of 0, and its output is padded"
    layers = (*stream.writers, *stream.readers, *(layer for readers in stream.norms.values() for layer in readers))
    names = [f"{name}.{kind}" for name in (*layers, *stream.norms) for kind in ("weight", "bias")]
    return shared_parameter(network.model, [*names, *filter(None, stream.writers.values()), *stream.tokens])


@torch.no_grad()
def rotate_stream(network: Network, stream: Stream, rotation: Tensor, centre: bool = True) -> None:
    """Rotate a residual stream in place: x becomes x·R; the network computes the same.

    Affine parts of LayerNorms, and LayerScales, move into the layers behind and before them; they become 1 and 0.
    A LayerNorm whose output leaves the network becomes a `MappedNorm`. Weights are multiplied in double precision.

    Args:
        network: an adapted model without quantizers.
        stream: stream of it without a `stream_problem`.
        rotation: orthogonal matrix R with R·1 = 1, C×C.
        centre: True, the default, takes the mean over channels out of the stream too, if every reader is a LayerNorm
            over one token, which takes it out itself.

    Raises:
        AdfqError: for a matrix that is not orthogonal or does not keep the mean.
    """
    model = network.model
    rotation = _checked(rotation, stream).to(next(model.parameters()).device)
    norms: dict[str, Any] = {name: model.get_submodule(name) for name in stream.norms}
    tokens = {name: norm.normalized_shape[0] // stream.width for name, norm in norms.items()}
    onto = rotation
    if centre and not stream.readers and all(count == 1 for count in tokens.values()):
        onto = rotation - rotation.mean(0)
    for name, scale in stream.writers.items():
        _write(weight_layer(model, name), model.get_parameter(scale) if scale else None, onto)
    for name in stream.tokens:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.double() @ onto)
    for name in stream.readers:
        _read(weight_layer(model, name), rotation)
    for name, layers in stream.norms.items():
        each = torch.eye(tokens[name]).to(rotation)
        back = torch.kron(rotation, each) if name in stream.interleaved else torch.kron(each, rotation)
        _fold_norm(network, name, layers, back)


def _checked(rotation: Tensor, stream: Stream) -> Tensor:
    rotation = rotation.detach().double()
    width = stream.width
    if rotation.shape != (width, width):
        raise AdfqError(f"{stream.name}: a rotation must be {width}×{width}, got {tuple(rotation.shape)}")
    eye, ones = torch.eye(width, dtype=rotation.dtype, device=rotation.device), rotation.new_ones(width)
    if (rotation @ rotation.T - eye).abs().amax() > _EXACT or (rotation @ ones - ones).abs().amax() > _EXACT:
        raise AdfqError(f"{stream.name}: a rotation must be orthogonal, and keep the mean of a row")
    return rotation


def _write(layer: QuantWeightLayer, scale: Tensor | None, onto: Tensor) -> None:
    """Multiply a layer's output by the scale of each channel, then by a matrix."""
    weight = layer.weight.double().flatten(1)
    bias = None if layer.bias is None else layer.bias.double()
    if scale is not None:
        weight, bias = weight * scale.double()[:, None], None if bias is None else bias * scale.double()
        scale.fill_(1)
    layer.weight.copy_((onto.T @ weight).view(layer.weight.shape))
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias @ onto)


def _read(layer: QuantWeightLayer, back: Tensor) -> None:
    """Make a layer take its input in rotated form."""
    weight = layer.weight.double().movedim(1, -1)
    layer.weight.copy_((weight @ back).movedim(-1, 1))


def _fold_norm(network: Network, name: str, layers: tuple[str, ...], back: Tensor) -> None:
    """Rotate the channels of a LayerNorm, and move its affine part into the layers that read it."""
    norm = network.model.get_submodule(name)
    assert isinstance(norm, nn.LayerNorm)
    ones = back.new_ones(len(back))
    gamma = ones if norm.weight is None else norm.weight.double()
    beta = 0 * ones if norm.bias is None else norm.bias.double()
    if not layers:
        mapped = map_norm(network.model, name)
        mapped.weight.copy_(gamma[:, None] * back)
        mapped.bias.copy_(beta)
    paddings = {id(found): found for layer in layers if (found := network.input_paddings.get(layer)) is not None}
    for padding in paddings.values():
        padding.copy_(((padding.double() - beta) / gamma) @ back)
    for layer in (weight_layer(network.model, layer) for layer in layers):
        weight = layer.weight.double()
        if beta.any():
            bias = weight @ beta if layer.bias is None else layer.bias.double() + weight @ beta
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        layer.weight.copy_((weight * gamma) @ back)
    if norm.weight is not None:
        norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.fill_(0)
