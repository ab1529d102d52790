"""RepQ-ViT (ICCV 2023, arXiv 2212.08254): calibration per channel, then reparameterization to per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.layers import QuantWeightLayer
from adfq.method import Method, Run
from adfq.quantizers import LogQuantizer, UniformQuantizer
from adfq.sites import POST_NORM_ROLES, Network, Recipe


@dataclass(frozen=True)
class RepQViT(Method):
    """RepQ-ViT: per-channel ranges after LayerNorm, made per tensor by scale reparameterization (section 3.2).

    Post-softmax attention is quantized in base √2 (section 3.3), the input image at 8 bits. Layers that share a
    LayerNorm are reparameterized together. A layer whose LayerNorm has readers of another kind or no bias is per tensor
    from the start.
    """

    label = "RepQ-ViT"
    paper = "arXiv 2212.08254"

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        return Recipe(
            activation=partial(UniformQuantizer, bits.activation, range="percentile"),
            weight=partial(UniformQuantizer, bits.weight, "row", "percentile"),
            activations={
                "patch_embed": partial(UniformQuantizer, 8, range="percentile"),
                "probs": partial(LogQuantizer, bits.activation),
            },
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        layers = dict(network.weight_layers())
        readers: dict[nn.LayerNorm, list[str]] = {}
        for name, norm in network.input_norms.items():
            readers.setdefault(norm, []).append(name)
        groups = {
            norm: names
            for norm, names in readers.items()
            if norm.bias is not None and all(layers[name].role in POST_NORM_ROLES for name in names)
        }
        for names in groups.values():
            for name in names:
                layers[name].input_quantizer = UniformQuantizer(bits.activation, "channel", "percentile")
        quantize_weights(network)
        calibrate_activations(network, run.images)
        for norm, names in groups.items():
            reparameterize(norm, [layers[name] for name in names], network.input_paddings.get(names[0]))
            for name in names:
                layers[name].find_weight_range()


@torch.no_grad()
def reparameterize(norm: nn.LayerNorm, layers: Sequence[QuantWeightLayer], padding: Tensor | None = None) -> None:
    """Move the differences between channel scales from the quantizer into LayerNorm and weight (equations 8 to 13).

    The two compute the same function in full precision as before. A channel without a range, which is 0 on all
    calibration images, takes no part in the means and is left as it is.

    Args:
        norm: the LayerNorm before the layers; it has no other readers.
        layers: layers with calibrated per-channel input quantizers, which are replaced by per-tensor ones. They read
            the same values, and have the same ranges.
        padding: the padding of the norm's output (C), changed in place; None for none. The released code leaves it
            0, which is another network.
    """
    quantizer = layers[0].input_quantizer
    assert isinstance(quantizer, UniformQuantizer)
    scale, zero_point, mean_scale, mean_zero_point = _scales_with_means(quantizer)
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
