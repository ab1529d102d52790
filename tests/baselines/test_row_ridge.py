"""Row-Ridge: weights by ridge regression and compensation, step sizes of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError, quantize
from adfq.calibration.compensation import AffineGrid, compensated_codes
from adfq.calibration.grams import Gram
from adfq.layers import QuantConv2d, QuantLinear, QuantWeightLayer
from adfq.quantizers import AffineUniformQuantizer, NumeratorQuantizer, UniformQuantizer
from adfq.sites import check_weights
from baselines.gptq import GPTQ
from baselines.row_ridge import RowRidge

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


def make_layer(inputs: int = 12, outputs: int = 20, bits: int = 3, bias: bool = True) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    layer = QuantLinear(nn.Linear(inputs, outputs, bias), "proj")
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    layer.weight_quantizer = AffineUniformQuantizer(bits, "row")
    return layer


def inputs_of(rows: int = 300, columns: int = 12) -> tuple[Tensor, Tensor]:
    """Return correlated inputs with a mean, in full precision and quantized to 3 bits."""
    x = torch.randn(rows, columns) @ torch.randn(columns, columns) + torch.randn(columns)
    return x, AffineUniformQuantizer(3).calibrate(x)(x)


def gram_of(layer: QuantLinear, quantized: Tensor, x: Tensor | None = None) -> Gram:
    gram = Gram(layer, x is not None)
    gram.update(quantized, x)
    return gram


def fit(method: RowRidge, x: Tensor, quantized: Tensor, **layer: Any) -> QuantLinear:
    fitted = make_layer(x.shape[1], **layer)
    method.fit(fitted, gram_of(fitted, quantized, x))
    return fitted


@torch.no_grad()
def error(fitted: QuantLinear, x: Tensor, quantized: Tensor, **layer: Any) -> float:
    return float((fitted(quantized) - make_layer(x.shape[1], **layer)(x)).norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [12, 150])
def test_the_outputs_error_falls_with_each_of_its_parts(columns: int, bias: bool) -> None:
    x, quantized = inputs_of(8 * columns, columns)
    whole, unfitted, uncompensated, neither = (
        error(fit(method, x, quantized, bias=bias), x, quantized, bias=bias)
        for method in (
            RowRidge(penalty=0.1),
            RowRidge(penalty=0.1, regression=False),
            RowRidge(penalty=0.1, compensation=False),
            RowRidge(penalty=0.1, compensation=False, regression=False),
        )
    )
    assert whole < 0.97 * min(unfitted, uncompensated)
    assert max(unfitted, uncompensated) < 0.98 * neither
    layer = make_layer(columns, bias=bias)
    layer.weight_quantizer = UniformQuantizer(3, "row", "percentile")
    layer.find_weight_range()
    layer.learned_weight = GPTQ().compensate(layer, gram_of(layer, quantized, x))
    assert whole < 0.95 * error(layer, x, quantized, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_before_rounding_is_the_ridge_regression(bias: bool) -> None:
    x, quantized = inputs_of()
    weight, (rows, columns) = make_layer(bias=bias).weight.detach().T.double(), x.shape
    inputs, targets = quantized.double(), x.double() @ weight
    if bias:
        inputs, targets = inputs - inputs.mean(0), targets - targets.mean(0)
    pull = (0.1 * inputs.square().sum(0).mean() / rows).sqrt()
    left = torch.cat((inputs / rows**0.5, pull * torch.eye(columns)))
    expected = torch.linalg.lstsq(left, torch.cat((targets / rows**0.5, pull * weight))).solution.T
    found = fit(RowRidge(penalty=0.1, compensation=False), x, quantized, bits=8, bias=bias).effective_weight()
    assert (found - expected).norm() < 0.2 * (weight.T - expected).norm()


def test_rounding_and_compensation_lower_the_same_objective() -> None:
    x, quantized = inputs_of(600, 40)
    weight = make_layer(40, bias=False).weight.detach()
    pull = quantized.square().mean()

    def objective(method: RowRidge) -> float:
        found = fit(method, x, quantized, bias=False).effective_weight()
        off = (quantized @ found.T - x @ weight.T).square().sum() / len(x)
        return float(off + pull * (found - weight).square().sum())

    found = objective(RowRidge())
    assert found < objective(RowRidge(compensation=False))
    assert found < objective(RowRidge(regression=False))


@pytest.mark.parametrize("regression", [True, False])
def test_without_activation_errors_it_is_compensation_alone(regression: bool) -> None:
    x, _ = inputs_of()
    layer = make_layer()
    weight = layer.weight.detach().clone()
    method = RowRidge(penalty=0.3, regression=regression)
    method.fit(layer, gram_of(layer, x))
    centred = (x - x.mean(0)).double()
    products = centred.T @ centred / len(x)
    products += 0.3 * products.diagonal().mean() * torch.eye(12)
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, AffineUniformQuantizer)
    codes = compensated_codes(weight.T.double(), products, AffineGrid.of(quantizer))
    assert torch.equal(layer.effective_weight(), quantizer.decode(codes.T.to(torch.uint8)))
    assert not torch.equal(layer.effective_weight(), quantizer(weight))


def test_a_huge_penalty_is_rounding_to_nearest() -> None:
    x, quantized = inputs_of()
    layer = make_layer()
    layer.find_weight_range()
    rounded = layer.effective_weight()
    assert torch.equal(fit(RowRidge(penalty=1e12), x, quantized).effective_weight(), rounded)
    assert not torch.equal(fit(RowRidge(), x, quantized).effective_weight(), rounded)


@pytest.mark.parametrize("compensation", [True, False])
@torch.no_grad()
def test_the_bias_makes_mean_outputs_exact(compensation: bool) -> None:
    x, quantized = inputs_of()
    fitted = fit(RowRidge(compensation=compensation), x, quantized)
    torch.testing.assert_close(fitted(quantized).mean(0), make_layer()(x).mean(0), rtol=1e-5, atol=1e-5)
    assert fit(RowRidge(), x, quantized, bias=False).bias is None


@pytest.mark.parametrize("dead", [[3], [0, 5, 11]])
def test_channels_that_are_always_zero_are_rounded(dead: list[int]) -> None:
    x, quantized = inputs_of()
    x[:, dead] = quantized[:, dead] = 0
    fitted = fit(RowRidge(), x, quantized)
    rounded = fitted.weight_quantizer(make_layer().weight).detach()
    assert torch.equal(fitted.effective_weight()[:, dead], rounded[:, dead])


@torch.no_grad()
def test_a_convolution_is_one_of_its_patches() -> None:
    x, plain = torch.randn(20, 3, 8, 8).cumsum(-1), nn.Conv2d(3, 6, 2, 2)
    expected, quantized = plain(x), AffineUniformQuantizer(4).calibrate(x)(x)
    errors = []
    for method in (RowRidge(penalty=0.1), RowRidge(regression=False, compensation=False)):
        layer = QuantConv2d(plain, "patch_embed")
        layer.weight_quantizer = AffineUniformQuantizer(3, "row")
        gram = Gram(layer, True)
        gram.update(quantized, x)
        method.fit(layer, gram)
        errors.append((layer(quantized) - expected).norm())
        torch.testing.assert_close(layer(quantized).mean((0, 2, 3)), expected.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert errors[0] < 0.95 * errors[1]


def family(kind: str, make_vit: MakeModel, make_swin: MakeModel) -> nn.Module:
    return make_vit() if kind == "vit" else make_swin(depths=(1, 2))


@pytest.mark.parametrize("kind", ["vit", "swin"])
@torch.no_grad()
def test_it_beats_base_ptq_in_batches_as_in_one(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model, images = family(kind, make_vit, make_swin).double(), make_images(8).double()
    test = make_images(4, seed=2).double()
    expected = model(test)
    whole = quantize(model, "row_ridge", 3, 3, images)
    check_weights(whole)
    plain = quantize(model, "base_ptq", 3, 3, images)
    assert (whole(test) - expected).norm() < 0.8 * (plain(test) - expected).norm()
    in_batches = quantize(model, "row_ridge", 3, 3, images.split(3))
    for layer, other in zip(whole.modules(), in_batches.modules(), strict=True):
        if isinstance(layer, QuantWeightLayer):
            torch.testing.assert_close(other.weight, layer.weight, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(other.bias, layer.bias, rtol=1e-6, atol=1e-6)
    adfq.save(whole, tmp_path / "model.safetensors")
    assert torch.equal(adfq.load(tmp_path / "model.safetensors")(test), whole(test))


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("positions", [True, False])
def test_positions_heads_and_channels_have_step_sizes(
    kind: str, positions: bool, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    found = quantize(family(kind, make_vit, make_swin), "row_ridge", 4, 4, make_images(), positions=positions)
    block = next(module for name, module in found.named_modules() if name.endswith("blocks.0"))
    attention = block.attn
    heads, width = attention.num_heads, attention.qkv.in_features // attention.num_heads
    rows = attention.qkv.input_quantizer.scale.numel()
    kinds = {
        "query": attention.scores.left_quantizer,
        "key": attention.scores.right_quantizer,
        "value": attention.context.right_quantizer,
    }
    layers = (attention.qkv, attention.proj, block.mlp.fc1, block.mlp.fc2)
    if positions:
        assert rows == (17 if kind == "vit" else 16)
        per_position = (1, heads, rows, 1)
        expected = {"query": per_position, "key": per_position, "value": (1, heads, 1, width)}
        for layer in layers:
            scale = layer.input_quantizer.scale
            assert scale.shape[-1] == 1
            assert scale.numel() == scale[0, ..., 0].numel() > 1
    else:
        expected = dict.fromkeys(kinds, (1, heads, 1, 1))
        assert all(layer.input_quantizer.scale.dim() == 0 for layer in layers)
    assert {name: quantizer.scale.shape for name, quantizer in kinds.items()} == expected
    assert isinstance(attention.context.left_quantizer, NumeratorQuantizer)
    assert kinds["query"].zero_point.unique().tolist() == [7.5]
    for layer in layers:
        assert layer.weight_quantizer.zero_point.unique().tolist() == [7.5]
        assert layer.input_quantizer.zero_point.unique().numel() == 1
    first = next(module for module in found.modules() if isinstance(module, QuantConv2d))
    assert first.input_quantizer.bits == 8


@pytest.mark.parametrize(
    "part", ["importance", "standardized", "numerators", "positions", "regression", "compensation"]
)
@torch.no_grad()
def test_each_part_can_be_left_out(part: str, make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1), make_images(8)
    whole, without = (quantize(model, method, 3, 3, images) for method in (RowRidge(), RowRidge(**{part: False})))
    assert not torch.equal(whole(images), without(images))
    norms = [found.get_submodule("blocks.0.norm1").weight for found in (model, whole, without)]
    assert torch.equal(norms[0], norms[2]) == (part == "standardized")
    assert not torch.equal(norms[0], norms[1])


@torch.no_grad()
def test_images_of_several_token_counts_have_one_step_size(make_vit: MakeModel) -> None:
    model = make_vit(dynamic_img_size=True)
    batches = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 48, 32)]
    found = quantize(model, "row_ridge", 8, 8, batches, calibration_size=8)
    attention: Any = found.get_submodule("blocks.0.attn")
    assert attention.qkv.input_quantizer.scale.dim() == 0
    assert attention.scores.left_quantizer.scale.shape == (1, 3, 1, 1)
    for images in (*batches, torch.randn(2, 3, 64, 64)):
        expected = model(images)
        assert (found(images) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("inf"), float("nan")])
def test_a_penalty_out_of_range_is_refused(penalty: float) -> None:
    with pytest.raises(AdfqError) as caught:
        RowRidge(penalty=penalty)
    assert str(caught.value) == f"penalty must be a finite number above 0, got {penalty}"


@torch.no_grad()
def test_reconstruction_without_iterations_is_calibration_alone(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(depth=1), make_images()
    plain, none = (
        quantize(model, method, 3, 3, images) for method in (RowRidge(), RowRidge(reconstruct=True, iterations=0))
    )
    assert torch.equal(none(images), plain(images))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_reconstruction_is_resumed_and_saved(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"img_size": 16, "depths": (1, 1)}
    model, images = (make_vit(), make_images(64)) if kind == "vit" else (make_swin(**small), make_images(64, 16))
    method = RowRidge(reconstruct=True, iterations=30)
    found, again = (quantize(model, method, 3, 3, images, resume=tmp_path / "kept") for _ in range(2))
    results = found.quantization.report["modules"]  # type: ignore[union-attr, operator]
    assert sum(result["after"] < result["before"] for result in results.values()) >= len(results) - 2
    adfq.save(found, tmp_path / "model.safetensors")
    loaded = adfq.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = found(images)
        assert all(torch.equal(each(images), expected) for each in (again, loaded))


@pytest.mark.parametrize("name", ["local_weight", "weight_travel", "step_travel"])
def test_options_of_reconstruction_are_checked(name: str) -> None:
    with pytest.raises(AdfqError, match=name):
        RowRidge(**{name: -1.0})
