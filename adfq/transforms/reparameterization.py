"""Scale reparameterization of RepQ-ViT (arXiv 2212.08254, section 3.2): from scales per channel to one per tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adfq.calibration import CalibrationImages, calibrate_activations, quantize_weights
from adfq.layers import QuantWeightLayer
from adfq.quantizers import UniformQuantizer
from adfq.sites import POST_NORM_ROLES, Network


class NormGroup(NamedTuple):
    """A LayerNorm and all layers that read it.

    Attributes:
        norm: the LayerNorm; it has a bias.
        layers: the layers that read its output; nothing else does.
        padding: the padding of the norm's output (C); None for none.
    """

    norm: nn.LayerNorm
    layers: list[QuantWeightLayer]
    padding: Tensor | None


def norms_with_readers(network: Network, roles: Collection[str]) -> list[NormGroup]:
    """Return the LayerNorms with a bias whose readers all have certain roles.

    Args:
        network: an adapted model.
        roles: roles of the readers.
    """
    layers = dict(network.weight_layers())
    readers: dict[nn.LayerNorm, list[str]] = {}
    for name, norm in network.input_norms.items():
        readers.setdefault(norm, []).append(name)
    return [
        NormGroup(norm, [layers[name] for name in names], network.input_paddings.get(names[0]))
        for norm, names in readers.items()
        if norm.bias is not None and all(layers[name].role in roles for name in names)
    ]


def calibrate_reparameterized(
    network: Network, images: CalibrationImages, by_channel: Callable[[], UniformQuantizer]
) -> None:
    """Calibrate weights and activations, those behind a LayerNorm per channel, and move these scales into the norms.

    Args:
        network: network with quantizers attached. Layers that share a LayerNorm are reparameterized together. A layer
            whose LayerNorm has readers of another kind or no bias keeps its quantizer.
        images: calibration images.
        by_channel: factory of the quantizers behind a LayerNorm, per channel.
    """
    groups = norms_with_readers(network, POST_NORM_ROLES)
    readers = [layer for group in groups for layer in group.layers]
    for layer in readers:
        layer.input_quantizer = by_channel()
    quantize_weights(network)
    calibrate_activations(network, images)
    for group in groups:
        reparameterize(*group)
    for layer in readers:
        layer.find_weight_range()


@torch.no_grad()
def reparameterize(
    norm: nn.LayerNorm,
    layers: Sequence[QuantWeightLayer],
    padding: Tensor | None = None,
    whole_zero_point: bool = False,
) -> tuple[Tensor, Tensor]:
    """Move the differences between channel scales from the quantizer into LayerNorm and weight (equations 8 to 13).

    The two compute the same function in full precision as before. A channel without a range, which is 0 on all
    calibration images, takes no part in the means and is left as it is.

    Args:
        norm: the LayerNorm before the layers; it has no other readers.
        layers: layers with calibrated per-channel input quantizers, which are replaced by per-tensor ones. They read
            the same values, and have the same ranges.
        padding: the padding of the norm's output (C), changed in place; None for none. The released code leaves it
            0, which is another network.
        whole_zero_point: True rounds the mean zero point, as AdaLog does; False by default.

    Returns:
        Ratio r and offset c (C each): what the norm's output x has become is x/r - c.
    """
    quantizer = layers[0].input_quantizer
    assert isinstance(quantizer, UniformQuantizer)
    scale, zero_point, mean_scale, mean_zero_point = _scales_with_means(quantizer)
    if whole_zero_point:
        mean_zero_point = mean_zero_point.round()
    ratio = scale / mean_scale
    offset = mean_zero_point * mean_scale - zero_point * scale / ratio

    norm.weight.copy_(norm.weight / ratio)
    norm.bias.copy_(norm.bias / ratio - offset)
    if padding is not None:
        padding.copy_(padding / ratio - offset)
    for layer in layers:
        weight = layer.weight.float() * ratio
        bias = weight @ offset if layer.bias is None else layer.bias + weight @ offset
        layer.weight, layer.bias = (nn.Parameter(tensor.to(layer.weight.dtype)) for tensor in (weight, bias))

        per_tensor = UniformQuantizer(quantizer.bits, "tensor", quantizer.range)
        per_tensor.scale, per_tensor.zero_point = mean_scale.clone(), mean_zero_point.clone()
        layer.input_quantizer = per_tensor.to(scale.device)
    return ratio, offset


def _scales_with_means(quantizer: UniformQuantizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scale and zero point of each channel, and the means of both.

    Channels without a range get the mean scale, and a zero point with which the mean grid represents 0.
    """
    scale, zero_point = quantizer.scale.flatten(), quantizer.zero_point.flatten()
    live = quantizer.has_range.flatten() & (scale >= torch.finfo(scale.dtype).tiny)
    if live.all() or not live.any():
        return scale, zero_point, scale.mean(), zero_point.mean()
    mean_scale, mean_zero_point = scale[live].mean(), zero_point[live].mean()
    outside = mean_zero_point.clamp(0, quantizer.levels - 1) - mean_zero_point
    for_zero = mean_zero_point + outside.sign() * outside.abs().ceil()  # whole steps off the mean
    scale, zero_point = torch.where(live, scale, mean_scale), torch.where(live, zero_point, for_zero)
    return scale, zero_point, mean_scale, mean_zero_point
