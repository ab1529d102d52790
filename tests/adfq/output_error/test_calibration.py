"""Calibration by output errors: fallback, samples, errors, dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.errors import NonFiniteError
from adfq.layers import QuantConv2d, QuantLinear, QuantMatMul
from adfq.method import Run
from adfq.output_error import APHQ, Settings, calibrate_by_output_error, samples
from adfq.output_error.samples import Sampler
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
ONCE = Settings(rounds=1, steps=1)


class Twice(nn.Module):
    """A model without a trunk, with a layer that is used twice and a convolution whose windows overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = QuantConv2d(nn.Conv2d(3, 8, 3, padding=1), "conv")
        self.shared = QuantLinear(nn.Linear(8, 8), "proj")
        self.last = QuantLinear(nn.Linear(8, 4), "head")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        return self.last(self.shared(self.shared(x).relu()))


def test_layers_that_do_not_fit_have_plain_ranges(make_images: MakeImages) -> None:
    model, images = Twice().eval(), make_images(2, 8)
    expected = model(images)
    calibrate_by_output_error(Network(model), Run(CalibrationImages(images.split(1))), Bits(6, 6), ONCE)
    for layer in (model.conv, model.shared, model.last):
        assert isinstance(layer.input_quantizer, UniformQuantizer)
        assert layer.input_quantizer.granularity == "tensor"
        assert layer.input_quantizer.is_calibrated
    plain = UniformQuantizer(6, "row", "percentile").calibrate(model.shared.weight)
    assert torch.equal(model.shared.weight_quantizer.scale, plain.scale)
    assert torch.equal(
        model.conv.input_quantizer.scale, UniformQuantizer(6, range="percentile").calibrate(images).scale
    )
    assert (model(images) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("settings", [ONCE, APHQ], ids=["widths", "ends"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(settings: Settings, dtype: torch.dtype, make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1).to(dtype), make_images(2).to(dtype)
    expected = model(images).float()
    network = adapt(model)
    calibrate_by_output_error(network, Run(CalibrationImages([images])), Bits(8, 8), settings)
    assert (model(images).float() - expected).norm() < 0.2 * expected.norm()
    assert all(q.scale.dtype == torch.float32 for q in network.activation_quantizers().values())


def test_values_that_are_not_finite_are_named(make_vit: MakeModel, make_images: MakeImages) -> None:
    for name, says in (("blocks.0.mlp.fc1.weight", r"fc1\.weight: "), ("blocks.0.norm2.bias", r"mlp\.fc1: ")):
        model = make_vit(depth=1)
        model.get_parameter(name).data[0] = torch.nan
        with pytest.raises(NonFiniteError, match=says):
            adfq.quantize(model, "adalog", 4, 4, make_images(2))


def test_dead_channels_take_no_part(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1), make_images(2)
    norm = model.get_submodule("blocks.0.norm1")
    norm.weight.data[:24], norm.bias.data[:24] = 0, 0
    expected = model(images)
    quantized = adfq.quantize(model, "adalog", 6, 6, images)
    assert (quantized(images) - expected).norm() < 0.3 * expected.norm()


def test_a_sample_has_all_of_few_tokens_and_some_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_TOKENS", 40)
    monkeypatch.setattr(samples, "_VALUES", 2 * (6 * 4 + 7 * 4) * 5)
    layer, product = QuantLinear(nn.Linear(4, 2), "proj"), QuantMatMul(("query", "key"), transpose_right=True)
    for count, tokens, entries in ((10, 40, 5), (2, 12, 2)):
        samplers = Sampler("layer", layer), Sampler("product", product)
        for part in (count // 2, count - count // 2):
            x = torch.randn(part, 6, 4)
            for sampler, inputs in zip(
                samplers, ((x,), (x[:, None].expand(-1, 2, -1, -1), torch.randn(part, 2, 7, 4))), strict=True
            ):
                sampler.begin(part / count)
                sampler.observe(sampler.operator, inputs)
        found = [sampler.sample for sampler in samplers]
        assert found[0].values[0].shape[2] == tokens
        assert tokens == 40 or len(found[0].values[0][0, 0].unique(dim=0)) == tokens
        assert len(found[1].values[0]) == len(found[1].values[1]) in (entries, entries + 1)


def test_an_operator_that_is_used_twice_or_never_has_no_sample() -> None:
    sampler = Sampler("layer", QuantLinear(nn.Linear(4, 2), "proj"))
    assert sampler.sample is None
    for _ in range(2):
        sampler.observe(sampler.operator, (torch.randn(2, 4),))
    assert sampler.sample is None
