"""RepQ-ViT (ICCV 2023, arXiv 2212.08254): quantize the hard way, then reparameterize to the simple one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adfq.calibration import calibrate_activations, quantize_weights
from adfq.layers import QuantWeightLayer
from adfq.methods import Bits
from adfq.quantizers import LogQuantizer, UniformQuantizer
from adfq.sites import POST_NORM_ROLES, Network, Recipe


def repq_vit(network: Network, images: Tensor, bits: Bits) -> None:
    """Post-LayerNorm activations are calibrated per channel and then made per tensor by scale reparameterization
    (section 3.2 of the paper); post-softmax attention is quantized in base √2 (section 3.3); input image at 8 bits.

    Layers whose LayerNorm other layers read as well, or that has no bias, stay per tensor from the start.
    """
    network.attach(
        Recipe(
            activation=lambda: UniformQuantizer(bits.activation, range="percentile"),
            weight=lambda: UniformQuantizer(bits.weight, "row", "percentile"),
            activations={
                "patch_embed": lambda: UniformQuantizer(8, range="percentile"),
                "probs": lambda: LogQuantizer(bits.activation),
            },
        )
    )
    pairs = [
        (network.norms[name], layer, network.paddings.get(name))
        for name, layer in network.weight_layers()
        if layer.role in POST_NORM_ROLES and name in network.norms and network.norms[name].bias is not None
    ]
    for _, layer, _ in pairs:
        layer.input_quantizer = UniformQuantizer(bits.activation, "channel", "percentile")
    quantize_weights(network)
    calibrate_activations(network, images)
    for norm, layer, padding in pairs:
        reparameterize(norm, layer, padding)
        layer.find_weight_range()


@torch.no_grad()
def reparameterize(norm: nn.LayerNorm, layer: QuantWeightLayer, padding: Tensor | None = None) -> None:
    """Moves the differences between channel scales from the quantizer into LayerNorm and weight (equations 8 to 13).

    The function that the two compute in full precision stays the same.

    Args:
        norm: the LayerNorm before the layer, which nothing else reads.
        layer: with a per-channel input quantizer, which becomes per-tensor.
        padding: what pads the norm's output (C), if something does; in the released code it stays 0, which is no
            longer what it was.
    """
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, UniformQuantizer)
    scale, zero_point = quantizer.scale.flatten(), quantizer.zero_point.flatten()
    mean_scale, mean_zero_point = scale.mean(), zero_point.mean()
    ratio = scale / mean_scale
    offset = mean_zero_point * mean_scale - zero_point * scale / ratio

    norm.weight.copy_(norm.weight / ratio)
    norm.bias.copy_(norm.bias / ratio - offset)
    if padding is not None:
        padding.copy_(padding / ratio - offset)
    weight = layer.weight.float() * ratio
    bias = weight @ offset if layer.bias is None else layer.bias + weight @ offset
    layer.weight, layer.bias = (nn.Parameter(tensor.to(layer.weight.dtype)) for tensor in (weight, bias))

    per_tensor = UniformQuantizer(quantizer.bits, "tensor", quantizer.range)
    per_tensor.scale, per_tensor.zero_point = mean_scale, mean_zero_point
    layer.input_quantizer = per_tensor.to(scale.device)
