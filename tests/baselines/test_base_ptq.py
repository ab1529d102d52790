"""Plain post-training quantization."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adfq import quantize
from adfq.layers import QuantWeightLayer
from adfq.quantizers import UniformQuantizer
from adfq.sites import sites_of

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


@pytest.mark.parametrize("range", ["minmax", "percentile", "mse"])
def test_everything_is_uniform_per_tensor_and_per_output_channel(
    range: str, make_swin: MakeModel, make_images: MakeImages
) -> None:
    quantized = quantize(make_swin(), "base_ptq", 5, 3, make_images(), range=range)
    sites = [site for site in sites_of(quantized) if not site.is_weight]
    assert len(sites) == 19 + 16
    for name, role, quantizer in ((site.name, site.role, site.quantizer) for site in sites):
        assert type(quantizer) is UniformQuantizer
        assert (quantizer.granularity, quantizer.range) == ("tensor", range), name
        assert quantizer.bits == (8 if role == "patch_embed" else 3), name
        assert quantizer.scale.shape == ()
    for layer in quantized.modules():
        if isinstance(layer, QuantWeightLayer):
            quantizer = layer.weight_quantizer
            assert type(quantizer) is UniformQuantizer
            assert (quantizer.bits, quantizer.granularity, quantizer.range) == (5, "row", range)
            assert quantizer.scale.numel() == len(layer.weight)


def test_percentiles_are_the_default(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images()
    default, percentile, minmax = (
        quantize(model, "base_ptq", calibration=images, **options)(images)
        for options in ({}, {"range": "percentile"}, {"range": "minmax"})
    )
    assert torch.equal(default, percentile)
    assert not torch.allclose(default, minmax, rtol=1e-3)


def test_the_first_layer_is_what_the_formulas_say(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images()
    quantized = quantize(model, "base_ptq", 4, 4, images, range="minmax")

    def uniform(x: Tensor, low: Tensor, high: Tensor, levels: int) -> Tensor:
        scale = (high - low) / (levels - 1)
        zero_point = torch.round(-low / scale)
        return scale * (torch.clamp(torch.round(x / scale) + zero_point, 0, levels - 1) - zero_point)

    weight = model.patch_embed.proj.weight
    low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
    with torch.no_grad():
        expected = nn.functional.conv2d(
            uniform(images, images.min(), images.max(), 256),
            uniform(weight, low, high, 16),
            model.patch_embed.proj.bias,
            stride=8,
        )
        torch.testing.assert_close(quantized.patch_embed.proj(images), expected, rtol=1e-5, atol=1e-5)
