"""Layers with two quantized operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq import AdfqError
from adfq.layers import QuantConv2d, QuantLinear, QuantMatMul, QuantWeightLayer
from adfq.quantizers import Quantizer, UniformQuantizer


class CountingQuantizer(UniformQuantizer):
    """Counts its uses."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_computes_what_it_did(bias: bool) -> None:
    original, x = nn.Linear(6, 5, bias=bias), torch.randn(2, 3, 6)
    layer = QuantLinear(original, "proj")
    assert torch.equal(layer(x), original(x))
    assert layer.role == "proj"


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": (3, 5), "stride": (1, 2), "padding": "valid", "dilation": 2},
        {"kernel_size": 3, "groups": 2, "padding": "same"},
    ],
)
def test_a_convolution_computes_what_it_did(options: dict[str, Any]) -> None:
    original, x = nn.Conv2d(4, 6, **options), torch.randn(2, 4, 16, 16)
    assert torch.equal(QuantConv2d(original, "patch_embed")(x), original(x))


def test_a_convolution_that_pads_otherwise_is_refused() -> None:
    with pytest.raises(AdfqError, match="reflect"):
        QuantConv2d(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "patch_embed")


def test_a_matrix_product_is_one() -> None:
    left, right = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)
    assert torch.equal(QuantMatMul(("query", "key"), transpose_right=True)(left, right), left @ right.mT)
    assert torch.equal(QuantMatMul(("probs", "value"))(left, right.mT), left @ right.mT)


def test_both_operands_of_a_matrix_product_are_quantized() -> None:
    left, right = torch.randn(2, 4, 5), torch.randn(2, 6, 5)
    matmul = QuantMatMul(("query", "key"), transpose_right=True)
    matmul.left_quantizer = UniformQuantizer(3).calibrate(left)
    # Per channel, which fits only before the transposition.
    matmul.right_quantizer = UniformQuantizer(3, "channel").calibrate(right)
    expected = matmul.left_quantizer(left) @ matmul.right_quantizer(right).mT
    assert torch.equal(matmul(left, right), expected)
    assert not torch.allclose(expected, left @ right.mT)


def make_layer(kind: str) -> tuple[QuantWeightLayer, Tensor]:
    if kind == "linear":
        return QuantLinear(nn.Linear(6, 5), "qkv"), torch.randn(2, 3, 6)
    return QuantConv2d(nn.Conv2d(3, 5, 4, stride=4), "patch_embed"), torch.randn(2, 3, 8, 8)


both_kinds = pytest.mark.parametrize("kind", ["linear", "convolution"])


@both_kinds
def test_input_and_weight_are_quantized(kind: str) -> None:
    layer, x = make_layer(kind)
    plain, weight = layer(x), layer.weight.detach().clone()
    layer.input_quantizer = UniformQuantizer(3).calibrate(x)
    layer.weight_quantizer = UniformQuantizer(3, "row")
    layer.find_weight_range()
    expected_weight = UniformQuantizer(3, "row").calibrate(weight)(weight)
    quantized = layer(x)
    assert torch.equal(layer.weight, weight)  # still at hand
    assert torch.equal(layer.effective_weight(), expected_weight)

    layer.input_quantizer, layer.weight_quantizer, layer.weight.data = nn.Identity(), nn.Identity(), expected_weight
    expected = layer(UniformQuantizer(3).calibrate(x)(x))
    assert torch.equal(quantized, expected)
    assert not torch.allclose(quantized, plain)


@both_kinds
def test_freezing_keeps_the_result_and_drops_the_full_precision_weight(kind: str) -> None:
    layer, x = make_layer(kind)
    layer.weight_quantizer = UniformQuantizer(2, "row")
    layer.find_weight_range()
    before = layer(x)
    layer.freeze()
    assert torch.equal(layer(x), before)
    assert layer.frozen
    assert not layer.weight.requires_grad
    assert all(len(row.unique()) <= 4 for row in layer.weight)
    assert set(layer.state_dict()) == {"weight", "bias", "weight_quantizer.scale", "weight_quantizer.zero_point"}


@both_kinds
def test_freezing_a_full_precision_layer_changes_nothing(kind: str) -> None:
    layer, _ = make_layer(kind)
    weight = layer.weight
    layer.find_weight_range()
    layer.freeze()
    assert layer.weight is weight


@both_kinds
def test_a_learned_weight_stands_in_for_what_the_quantizer_gives(kind: str) -> None:
    layer, x = make_layer(kind)
    layer.weight_quantizer = UniformQuantizer(2, "row")
    layer.find_weight_range()
    layer.learned_weight = learned = torch.ones_like(layer.weight)
    assert "learned_weight" not in layer.state_dict()  # it becomes the weight
    before = layer(x)
    layer.freeze()
    assert torch.equal(layer.weight, learned)
    assert torch.equal(layer(x), before)
    assert layer.learned_weight is None


@both_kinds
def test_a_frozen_weight_is_not_quantized_again(kind: str) -> None:
    layer, x = make_layer(kind)
    quantizer = layer.weight_quantizer = CountingQuantizer(4, "row")
    layer.find_weight_range()
    layer.freeze()
    assert quantizer.calls == 1
    layer(x)
    assert quantizer.calls == 1


def test_a_changed_weight_can_get_another_range() -> None:
    layer, x = make_layer("linear")
    layer.weight_quantizer = UniformQuantizer(4, "row")
    layer.find_weight_range()
    before = layer(x) - layer.bias
    layer.weight.data *= 2
    layer.find_weight_range()
    torch.testing.assert_close(layer(x) - layer.bias, 2 * before)


def test_a_layer_holds_quantizers_as_submodules() -> None:
    layer, _ = make_layer("linear")
    layer.input_quantizer, layer.weight_quantizer = UniformQuantizer(4), UniformQuantizer(4, "row")
    assert sum(isinstance(module, Quantizer) for module in layer.modules()) == 2
