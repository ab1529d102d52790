"""GPTQ: compensation of rounding errors under the Gram matrix of a layer's inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq import AdfqError, quantize
from adfq.calibration import compensation
from adfq.calibration.grams import Gram
from adfq.layers import QuantLinear, QuantWeightLayer
from adfq.quantizers import UniformQuantizer
from adfq.sites import check_weights
from baselines import gptq
from baselines.gptq import GPTQ

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


def make_layer(inputs: int = 12, outputs: int = 20, bits: int = 3) -> QuantLinear:
    layer = QuantLinear(nn.Linear(inputs, outputs, bias=False), "proj")
    layer.weight_quantizer = UniformQuantizer(bits, "row", "percentile")
    layer.find_weight_range()
    return layer


def correlated(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns) @ torch.randn(columns, columns) + torch.randn(columns)


def gram_of(layer: QuantLinear, x: Tensor, target: Tensor | None = None) -> Gram:
    gram = Gram(layer, target is not None)
    gram.update(x, target)
    return gram


def error(layer: QuantLinear, weight: Tensor, x: Tensor, target: Tensor | None = None) -> float:
    return float((x @ weight.T - (x if target is None else target) @ layer.weight.detach().T).norm())


def rounded(layer: QuantLinear) -> Tensor:
    quantized: Tensor = layer.weight_quantizer(layer.weight)
    return quantized.detach()


@pytest.mark.parametrize("order", ["activation", "index"])
@pytest.mark.parametrize("columns", [12, 300])
def test_the_outputs_error_falls_below_that_of_rounding(columns: int, order: str) -> None:
    layer, x = make_layer(columns), correlated(2 * columns, columns)
    found = GPTQ(order=order).compensate(layer, gram_of(layer, x))
    assert error(layer, found, x) < 0.9 * error(layer, rounded(layer), x)
    assert found.dtype == layer.weight.dtype
    assert torch.equal(layer.weight_quantizer(found), found)
    assert found.is_contiguous()  # products would differ in the last digit from those of a loaded model


def test_without_correlation_or_with_infinite_damping_it_is_rounding() -> None:
    layer, x = make_layer(), correlated(50, 12)
    assert torch.equal(GPTQ(damping=1e12).compensate(layer, gram_of(layer, x)), rounded(layer))
    assert not torch.equal(GPTQ().compensate(layer, gram_of(layer, x)), rounded(layer))
    diagonal = torch.diag(torch.rand(12) + 0.1)
    assert torch.equal(GPTQ().compensate(layer, gram_of(layer, diagonal)), rounded(layer))


def test_each_column_is_made_up_for_by_the_best_of_those_after_it() -> None:
    layer, x = make_layer(4, 5), correlated(30, 4).double()
    damped = x.T @ x + 0.01 * x.square().sum(0).mean() * torch.eye(4)
    weight, found = layer.weight.detach().double().clone(), torch.zeros(5, 4)
    for column in range(4):
        found[:, column] = layer.weight_quantizer(weight.float())[:, column]
        off = found[:, column].double() - weight[:, column]
        rest = slice(column + 1, 4)
        weight[:, rest] -= torch.linalg.solve(damped[rest, rest], damped[rest, column][:, None] * off).T
    assert torch.equal(GPTQ(order="index").compensate(layer, gram_of(layer, x.float())), found)


@pytest.mark.parametrize("target", [False, True])
def test_blocks_of_columns_do_not_matter(target: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(40), correlated(90, 40)
    gram = gram_of(layer, x, x + 0.3 * torch.randn(90, 40) if target else None)
    whole = GPTQ().compensate(layer, gram)
    monkeypatch.setattr(compensation, "_BLOCK", 7)
    assert torch.equal(GPTQ().compensate(layer, gram), whole)


def test_the_correction_aims_at_outputs_in_full_precision() -> None:
    layer, x = make_layer(bits=8), correlated(60, 12)
    target = x + 0.2 * torch.randn(60, 12)
    errors = [
        error(layer, GPTQ(correction=share).compensate(layer, gram_of(layer, x, target)), x, target)
        for share in (0.0, 0.25, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    plain = GPTQ().compensate(layer, gram_of(layer, x))
    assert torch.equal(GPTQ(correction=0.0).compensate(layer, gram_of(layer, x, target)), plain)


@pytest.mark.parametrize("dead", [[3], list(range(12))])
def test_channels_that_are_always_zero_are_rounded(dead: list[int]) -> None:
    layer, x = make_layer(), correlated(50, 12)
    x[:, dead] = 0
    found = GPTQ().compensate(layer, gram_of(layer, x))
    assert torch.equal(found[:, dead], rounded(layer)[:, dead])


@pytest.mark.parametrize("inputs", gptq.INPUTS)
@torch.no_grad()
def test_it_beats_base_ptq_in_batches_as_in_one(inputs: str, make_swin: MakeModel, make_images: MakeImages) -> None:
    model, images, test = make_swin().double(), make_images(8).double(), make_images(4, seed=2).double()
    expected = model(test)
    whole = quantize(model, "gptq", 3, 6, images, inputs=inputs)
    check_weights(whole)
    plain = quantize(model, "base_ptq", 3, 6, images)
    assert (whole(test) - expected).norm() < 0.7 * (plain(test) - expected).norm()
    in_batches = quantize(model, "gptq", 3, 6, images.split(3), inputs=inputs)
    for layer, other in zip(whole.modules(), in_batches.modules(), strict=True):
        if isinstance(layer, QuantWeightLayer):
            assert (layer.weight != other.weight).float().mean() < 0.01


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inputs": "none"}, "unknown inputs 'none'; there are asymmetric, quantized, full_precision"),
        ({"order": "random"}, "unknown order 'random'; there are activation, index"),
        ({"damping": 0.0}, "damping must be a finite number above 0, got 0.0"),
        ({"correction": 1.5}, "correction must be a finite number from 0 to 1.0, got 1.5"),
    ],
)
def test_options_are_checked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(AdfqError) as caught:
        GPTQ(**options)
    assert says in str(caught.value)
