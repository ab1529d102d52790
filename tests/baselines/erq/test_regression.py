"""ERQ's regressions, against their formulas and the released code's layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adfq.calibration.grams import Gram
from adfq.layers import QuantConv2d, QuantLinear, QuantWeightLayer
from adfq.quantizers import DualUniformQuantizer, UniformQuantizer
from baselines.erq import ERQ
from baselines.erq.regression import (
    Grid,
    correct_activation_error,
    correct_weight_error,
    refine_rounding,
    second_moments,
    values_of,
    with_ones,
)

LAYERS = ("patch_embed", "qkv", "proj", "fc1", "fc2", "head")


def make_layer(bias: bool, inputs: int = 13, outputs: int = 20) -> tuple[QuantLinear, Tensor, Tensor]:
    """Return a layer, inputs, and quantized inputs, in double precision."""
    layer = QuantLinear(nn.Linear(inputs, outputs, bias=bias).double(), "proj")
    x = torch.randn(60, inputs).double() @ torch.randn(inputs, inputs).double() + torch.randn(inputs)
    return layer, x, UniformQuantizer(3).calibrate(x)(x)


def gram_of(layer: QuantWeightLayer, x: Tensor, quantized: Tensor) -> Gram:
    gram = Gram(layer, True)
    gram.update(quantized, x)
    return gram


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_activation_errors_are_regressed_on(bias: bool) -> None:
    layer, x, quantized = make_layer(bias)
    values, (products, differences) = values_of(layer), with_ones(gram_of(layer, x, quantized), bias)
    rows = torch.cat((quantized, torch.ones(60, 1)), 1) if bias else quantized
    found = correct_activation_error(values, products, differences, 10.0)
    residual = layer(x) - rows @ values.T
    change = torch.linalg.solve(rows.T @ rows + 10 * torch.eye(rows.shape[1]), rows.T @ residual)
    torch.testing.assert_close(found, values + change.T)
    after = (layer(x) - rows @ found.T).square().sum() + 10 * (found - values).square().sum()
    assert after < 0.9 * residual.square().sum()
    torch.testing.assert_close(correct_activation_error(values, products, differences, 1e15), values)
    unchanged = with_ones(gram_of(layer, quantized, quantized), bias)
    assert torch.equal(correct_activation_error(values, *unchanged, 1e-3), values)


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_rest_of_a_weight_makes_up_for_the_rounded_half(bias: bool, refined: bool) -> None:
    layer, x, quantized = make_layer(bias)
    quantizer = UniformQuantizer(3, "row", "percentile10").calibrate(layer.weight)
    grid, values, gram = Grid.of(quantizer, 13), values_of(layer), gram_of(layer, x, quantized)
    products, _ = with_ones(gram, bias)
    found = correct_weight_error(values, grid, products, 1.0, second_moments(gram) if refined else None)
    weight = found[:, :13].float()
    torch.testing.assert_close(quantizer(weight), weight)
    rows = torch.cat((quantized, torch.ones(60, 1)), 1) if bias else quantized
    rounded = torch.cat((grid.round(values[:, :13], slice(0, 13)), values[:, 13:]), 1)
    assert (rows @ (found - values).T).norm() < 0.95 * (rows @ (rounded - values).T).norm()


def test_second_moments_are_those_of_the_released_code() -> None:
    layer, x, quantized = make_layer(False)
    mean = quantized.mean(0)
    expected = mean[:, None] * mean + torch.cov(quantized.T)
    torch.testing.assert_close(second_moments(gram_of(layer, x, quantized)), expected)


def test_refined_roundings_have_a_smaller_error() -> None:
    x = torch.randn(40, 8).double() @ torch.randn(8, 8).double()
    moments, values = x.T @ x / 40, torch.randn(30, 8).double() * 3
    error = values.round() - values
    before, lower, upper = error.clone(), values.floor() - values, values.ceil() - values
    refine_rounding(error, lower, upper, moments)
    assert ((error == lower) | (error == upper)).all()
    growth = ((error @ moments) * error).sum(1) - ((before @ moments) * before).sum(1)
    assert (growth < 1e-12).all()
    assert growth.min() < -0.1
    again = error.clone()
    refine_rounding(again, lower, upper, moments)
    assert torch.equal(again, error)


@pytest.mark.parametrize("case", ["w3_coe100", "w4_coe100", "w4_coe10000"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_golden_layers(name: str, case: str, load_golden: Callable[[str], dict[str, Tensor]]) -> None:
    vectors = load_golden("erq_layers_31.npz")
    bits, coe = int(case[1]), float(case.partition("_coe")[2])
    golden = {key.rpartition("/")[2]: v for key, v in vectors.items() if key.startswith(f"{name}/{case}/")}
    x = vectors[f"{name}/w3/x" if name == "patch_embed" else f"{name}/w{bits}/x"]
    quantized = vectors.get(f"{name}/w{bits}/xq", x)
    target, shape = vectors[f"{name}/y_fp"], golden["weight"].shape
    layer: QuantWeightLayer
    if name == "patch_embed":
        layer = QuantConv2d(nn.Conv2d(3, 32, 8, 8), name)
    else:
        layer = QuantLinear(nn.Linear(shape[1], shape[0]), name)
    assert layer.bias is not None
    layer.weight.copy_(golden["weight"])
    layer.bias.copy_(golden["bias"])
    dual = name in ("qkv", "fc1")
    layer.weight_quantizer = DualUniformQuantizer(bits) if dual else UniformQuantizer(bits, "row", "percentile10")

    gram = gram_of(layer, x, quantized)
    values = values_of(layer)
    if name != "patch_embed":
        penalty = 0.1 if name == "head" else coe / 10
        values = correct_activation_error(values, *with_ones(gram, True), penalty)
    expected = torch.cat((golden["weight_aqer"].flatten(1), golden["bias_aqer"][:, None]), 1).double()
    assert (values - expected).norm() < 1e-3 * expected.norm()

    weight, bias = ERQ(coe).correct(layer, gram)
    scale = layer.weight_quantizer.scale
    if isinstance(layer.weight_quantizer, DualUniformQuantizer):
        outliers = layer.weight_quantizer.is_outlier.nonzero()[:, 0]
        assert outliers.tolist() == golden["outlier_columns"].sort().values.tolist()
        torch.testing.assert_close(scale[:, 1], golden["weight_scale_outlier"], rtol=1e-3, atol=0.0)
        scale = scale[:, 0]
    torch.testing.assert_close(scale.flatten(), golden["weight_scale"], rtol=1e-3, atol=0.0)
    largest = golden["weight_final"].flatten(1).abs().amax(1, keepdim=True)
    same = ((weight - golden["weight_final"]).flatten(1).abs() < 1e-3 * largest).float().mean()
    assert same >= (0.98 if name == "head" else 0.995)

    def error(weight: Tensor, bias: Tensor) -> Tensor:
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        layer.weight_quantizer = nn.Identity()
        return (layer(quantized) - target).norm()

    assert bias is not None
    assert error(weight, bias) <= 1.02 * error(golden["weight_final"], golden["bias_final"])
    assert error(weight, bias) < error(golden["weight_rtn"], golden["bias_aqer"])
