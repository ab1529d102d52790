"""Gram matrices of layers' inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.calibration import CalibrationImages, calibrate_activations, grams
from adfq.calibration.grams import INPUTS, Gram, grams_of_layers, has_gram
from adfq.errors import AdfqError, NonFiniteError
from adfq.layers import QuantConv2d, QuantLinear
from adfq.quantizers import UniformQuantizer
from adfq.sites import Network, Recipe

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 3},
        {"stride": (2, 1), "padding": (1, 2)},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid", "dilation": 2},
    ],
)
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_a_convolution_is_the_product_of_its_patches(
    options: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grams, "_CHUNK", chunk)
    layer = QuantConv2d(nn.Conv2d(2, 4, (3, 2), bias=False, **options), "conv")
    x = torch.randn(2, 2, 9, 11)
    gram = Gram(layer)
    gram.update(x)
    outputs = layer(x).transpose(0, 1).flatten(1).detach().double()
    weight = layer.weight.detach().flatten(1).double()
    assert gram.rows == outputs.shape[1]
    torch.testing.assert_close(weight @ gram.products @ weight.T, outputs @ outputs.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weight @ gram.sums, outputs.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2**22])
def test_a_row_of_weight_two_counts_as_two(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "_CHUNK", chunk)
    layer = QuantLinear(nn.Linear(5, 3), "fc1")
    x, quantized, weights = torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.randint(0, 3, (2, 7))
    found, expected = Gram(layer, True), Gram(layer, True)
    found.update(quantized, x, weights)
    repeats = weights.flatten()
    expected.update(*(rows.flatten(0, 1).repeat_interleave(repeats, 0) for rows in (quantized, x)))
    assert found.rows == expected.rows == int(weights.sum())
    for field in ("products", "sums", "differences", "difference_sums"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field))


def test_layers_without_a_matrix() -> None:
    assert has_gram(QuantConv2d(nn.Conv2d(4, 4, 3), "conv"))
    assert not has_gram(QuantConv2d(nn.Conv2d(4, 4, 3, groups=4), "conv"))
    assert has_gram(QuantLinear(nn.Linear(8192, 1), "fc2"))
    assert not has_gram(QuantLinear(nn.Linear(8193, 1), "fc2"))


def network_of(model: nn.Module, images: Tensor) -> Network:
    """Return an adapted copy in double precision whose activations are quantized, and whose weights are not."""
    network = adapt(copy.deepcopy(model).double())
    network.attach(Recipe(lambda: UniformQuantizer(4), lambda: UniformQuantizer(4, "row")))
    calibrate_activations(network, CalibrationImages([images.double()]))
    return network


def matrices(network: Network, images: CalibrationImages, inputs: str) -> Mapping[str, Gram]:
    found = {name: gram for name, _, gram in grams_of_layers(network, images, inputs) if gram is not None}
    assert list(found) == [name for name, _ in network.weight_layers()]
    return found


@pytest.mark.parametrize("inputs", INPUTS)
def test_batches_and_memory_do_not_matter(
    inputs: str, make_swin: MakeModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, images = network_of(make_swin(), make_images(3)), make_images(3).double()
    whole = matrices(network, CalibrationImages([images]), inputs)
    monkeypatch.setattr(grams, "_MOST_VALUES", 1)
    for name, gram in matrices(network, CalibrationImages(images.split([1, 2])), inputs).items():
        assert gram.rows == whole[name].rows
        for field in ("products", "sums", "differences", "difference_sums"):
            found, expected = getattr(gram, field), getattr(whole[name], field)
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, msg=f"{name}: {{}}".format)


def test_inputs_are_those_of_their_network(make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images(3).double()
    network = network_of(model, images)
    layer = network.model.get_submodule("blocks.1.mlp.fc2")
    assert isinstance(layer, QuantLinear)
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    network.run(images)
    with network.full_precision():
        network.run(images)
    quantized, full = seen
    for inputs, expected, target in (
        ("full_precision", full, None),
        ("own", layer.input_quantizer(full), full),
        ("quantized", layer.input_quantizer(quantized), None),
        ("asymmetric", layer.input_quantizer(quantized), full),
    ):
        gram = matrices(network, CalibrationImages([images]), inputs)["blocks.1.mlp.fc2"]
        rows = expected.flatten(0, 1)
        torch.testing.assert_close(gram.products, rows.T @ rows)
        assert not gram.is_flat
        assert (gram.differences is None) == (target is None)
        if target is not None:
            torch.testing.assert_close(gram.differences, rows.T @ (target.flatten(0, 1) - rows))
            torch.testing.assert_close(gram.difference_sums, (target.flatten(0, 1) - rows).sum(0))


def test_later_layers_see_what_was_done_to_earlier_ones(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of(make_vit(), make_images(2)), CalibrationImages([make_images(2).double()])
    for inputs in ("quantized", "asymmetric"):
        for name, layer, gram in grams_of_layers(network, images, inputs):
            assert gram is not None
            if name == "blocks.0.attn.qkv":  # nothing is left of its bias beside zeros
                layer.learned_weight = torch.zeros_like(layer.weight)
                assert layer.bias is not None
                layer.bias.data.zero_()
            if name == "blocks.0.attn.proj":
                assert not gram.products.any()
        layer = network.model.get_submodule("blocks.0.attn.qkv")
        layer.learned_weight = None


def test_inputs_that_are_not_finite_are_refused(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of(make_vit(), make_images(2)), CalibrationImages([make_images(2).double()])
    network.model.get_submodule("norm").weight.data.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"^head: its inputs are not finite"):
        list(grams_of_layers(network, images, "full_precision"))


def test_a_matrix_without_an_inverse_is_refused() -> None:
    with pytest.raises(AdfqError, match="damping is too small: the Gram matrix"):
        grams.cholesky(-torch.eye(2), "damping")
