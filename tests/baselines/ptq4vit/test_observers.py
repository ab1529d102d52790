"""PTQ4ViT's observers: products on samples of constant size, whose squared errors are unbiased."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq.layers import QuantConv2d, QuantLinear, QuantMatMul, QuantWeightLayer
from adfq.quantizers import UniformQuantizer
from baselines.ptq4vit import observers as module
from baselines.ptq4vit.observers import COARSE, FINE, Observer, Size

LAYERS = ("linear", "convolution", "scores", "context")


def make_layer(kind: str) -> QuantWeightLayer | QuantMatMul:
    if kind == "linear":
        return QuantLinear(nn.Linear(5, 6, bias=False), "fc1")
    if kind == "convolution":
        return QuantConv2d(nn.Conv2d(5, 6, 3, padding=1, bias=False), "neck")
    return QuantMatMul(("query", "key") if kind == "scores" else ("probs", "value"), transpose_right=kind == "scores")


def make_inputs(kind: str, images: int, tokens: int) -> tuple[Tensor, ...]:
    """Inputs of a layer: images of very different size, with two heads in a product."""
    scale = torch.logspace(-1, 1, images).reshape(-1, 1, 1, 1)
    if kind == "linear":
        return ((torch.randn(images, tokens, 5) * scale[..., 0]),)
    if kind == "convolution":
        return (torch.randn(images, 5, tokens, 2) * scale,)
    left, right = torch.randn(2, images, 2, tokens, 5) * scale
    return (left, right) if kind == "scores" else ((left @ right.mT).softmax(-1), right)


def observe(
    layer: QuantWeightLayer | QuantMatMul, inputs: tuple[Tensor, ...], gradient: Tensor, batch_size: int
) -> Observer:
    observer = Observer("layer", layer, weighted=True)
    for *operands, part in zip(*(values.split(batch_size) for values in (*inputs, gradient)), strict=True):
        observer.keep(tuple(operands), part)
    return observer


def room(observer: Observer) -> int:
    """Bytes of all that an observer keeps."""
    sample = observer.sample
    tensors = [*sample._values, sample.weights, sample._energies, sample._places, *observer.largest]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_samples_have_one_size_whatever_the_images_and_passes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FINE", Size(rows=9, matrices=2, matrix_rows=3))
    layer, rooms, shapes = make_layer(kind), set(), set()
    for images in (1, 7, 64):
        inputs = make_inputs(kind, images, 10)
        gradient = torch.randn_like(layer(*inputs))
        for batch_size in (1, 3, images):
            observer = observe(layer, inputs, gradient, batch_size)
            rooms.add(room(observer))
            shapes.add(tuple(observer.product(module.FINE).gradient.shape))
    assert len(shapes) == 1
    assert max(rooms) == min(rooms)


@pytest.mark.parametrize("batch_size", [1, 3, 6])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_weighted_squared_errors_are_unbiased(kind: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse, fine = Size(rows=12, matrices=5, matrix_rows=4), Size(rows=24, matrices=10, matrix_rows=6)
    monkeypatch.setattr(module, "FINE", fine)
    monkeypatch.setattr(module, "Product", lambda left, right, gradient: (left, right, gradient))
    layer, inputs = make_layer(kind), make_inputs(kind, 6, 9)
    for side in ("left_quantizer", "right_quantizer", "weight_quantizer", "input_quantizer"):
        if hasattr(layer, side):
            setattr(layer, side, UniformQuantizer(3))
    output = layer_output(layer, inputs)
    gradient = torch.randn_like(output).pow(3)

    def error(observer: Observer, size: Size) -> Tensor:
        left, right, factors = observer.product(size)  # type: ignore[misc]
        exact, rounded = (left.rows(quantized) @ right.rows(quantized).mT for quantized in (False, True))
        return ((exact - rounded) * factors).square().sum().double()

    monkeypatch.setattr(module, "FINE", Size(1000, 1000, 1000))
    expected = error(observe(layer, inputs, gradient, batch_size), module.FINE)
    monkeypatch.setattr(module, "FINE", fine)
    estimates = []
    for _ in range(60):
        observer = observe(layer, inputs, gradient, batch_size)
        estimates.append(torch.stack([error(observer, size) for size in (coarse, fine)]))
    found = torch.stack(estimates)
    deviation = found.std(0) / len(found) ** 0.5
    assert (deviation < 0.1 * expected).all()
    assert (deviation > 0).all()
    assert ((found.mean(0) - expected).abs() < 3 * deviation).all()


def layer_output(layer: QuantWeightLayer | QuantMatMul, inputs: tuple[Tensor, ...]) -> Tensor:
    if isinstance(layer, QuantMatMul):
        return inputs[0] @ (inputs[1].mT if layer.transpose_right else inputs[1])
    return layer._apply_weight(inputs[0], layer.weight)


@pytest.mark.parametrize("kind", ["scores", "context"])
@torch.no_grad()
def test_images_of_different_sizes_share_a_sample(kind: str) -> None:
    """All is kept here: the error is the sum of the batches' errors."""
    layer = make_layer(kind)
    assert isinstance(layer, QuantMatMul)
    layer.left_quantizer, layer.right_quantizer = UniformQuantizer(3), UniformQuantizer(3)
    observer, expected = Observer("layer", layer, weighted=True), torch.zeros(())
    batches = []
    for tokens in (4, 9, 6):
        inputs = make_inputs(kind, 2, tokens)
        batches.append((inputs, torch.randn_like(layer_output(layer, inputs))))
        observer.keep(*batches[-1])
    product = observer.product(FINE)
    found = product.scores(1, product.operands[1].candidates[70:71])
    largest = max(gradient.abs().max() for _, gradient in batches)
    for inputs, gradient in batches:
        expected += ((layer(*inputs) - layer_output(layer, inputs)) * gradient / largest).square().sum()
    torch.testing.assert_close(found, expected.reshape(1, 1))


def test_operands_are_let_go_when_their_gradient_has_come() -> None:
    layer = make_layer("linear")
    observer = Observer("layer", layer, weighted=True)
    images = torch.randn(2, 3, 5, requires_grad=True)
    hidden = images * 2
    output = observer.observe(layer, (hidden,), layer(hidden))
    held = weakref.ref(hidden)
    del hidden
    torch.autograd.grad(output.sum(), images)
    assert len(observer.sample) == 6
    assert held() is None
    assert output.grad_fn is not None  # the graph still lives


def test_a_batch_is_not_held() -> None:
    """The sample copies its rows."""
    layer, rows = make_layer("linear"), torch.randn(4, 3, 5)
    observer = observe(layer, (rows,), torch.randn(4, 3, 6), 4)
    assert room(observer) < 12 * (5 + 6) * 4 + 12 * 8 * 4 + 100


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
    "depthwise, strided": {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 6, "bias": False},
    "groups": {"kernel_size": (3, 2), "padding": (2, 0), "stride": (1, 3), "dilation": (2, 1), "groups": 2},
    "as large as the input": {"kernel_size": 4, "padding": "same", "dilation": 2, "groups": 3},
    "no groups": {"kernel_size": 3, "padding": 1, "bias": False},
}


@pytest.mark.parametrize("size", [4, 24])  # all positions, and a sample of them
@pytest.mark.parametrize("which", CONVOLUTIONS)
@torch.no_grad()
def test_the_products_of_a_convolution_are_its_output(which: str, size: int) -> None:
    layer = QuantConv2d(nn.Conv2d(6, 12, **CONVOLUTIONS[which]), "neck")
    observer = Observer("layer", layer, weighted=True)
    outputs = []
    for count in (3, 1):
        images = torch.randn(count, 6, size, size)
        outputs.append(layer._apply_weight(images, layer.weight))
        if layer.bias is not None:
            outputs[-1] -= layer.bias[:, None, None]
        observer.keep((images,), torch.randn_like(outputs[-1]))
    expected = torch.cat([output.movedim(1, -1).flatten(0, 2) for output in outputs])
    product = observer.product(COARSE)
    assert product.target.shape[:2] == (layer.groups, 12 // layer.groups)
    found = product.target.flatten(0, 1).mT
    if len(expected) <= 128:
        torch.testing.assert_close(found, expected)
    else:
        assert len(found) == 128
        torch.testing.assert_close(found, expected[torch.cdist(found, expected).argmin(1)])
        assert len(found.unique(dim=0)) > 100
