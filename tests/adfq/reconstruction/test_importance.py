"""The importance of rows for a network's output."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.calibration import CalibrationImages
from adfq.layers import QuantConv2d
from adfq.reconstruction import importance_of_rows
from adfq.sites import Network

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]


def network_of(model: nn.Module) -> Network:
    return adapt(copy.deepcopy(model).double())


def importance(network: Network, *batches: Tensor) -> Mapping[str, Tensor]:
    found = importance_of_rows(network, CalibrationImages([batch.double() for batch in batches]))
    return {name: torch.cat(calls) for name, calls in found.items()}


def gradients(network: Network, images: Tensor) -> Mapping[str, Tensor]:
    """Return the importance along the two directions of the generator's first seed, from kept gradients."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    hooks = [layer.register_forward_hook(partial(keep, name)) for name, layer in network.weight_layers()]
    logits = network.model(images.double())
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    signs = torch.stack([torch.randint(2, (2, *logits.shape[1:]), generator=generator) * 2 - 1 for _ in images], 1)
    squares = dict.fromkeys(outputs, torch.zeros(()))
    for own in signs:
        for output in outputs.values():
            output.grad = None
        (logits * own).sum().backward(retain_graph=True)
        for name, output in outputs.items():
            assert output.grad is not None
            channels = 1 if isinstance(network.model.get_submodule(name), QuantConv2d) else -1
            squares[name] = squares[name] + output.grad.square().sum(channels)
    return {name: square.sqrt() for name, square in squares.items()}


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_it_is_the_norm_of_the_gradient(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    network, images = network_of(make_vit() if kind == "vit" else make_swin()), make_images(3)
    found, expected = importance(network, images), gradients(network, images)
    assert found.keys() == dict(network.weight_layers()).keys()
    ratios = []
    for name, own in found.items():
        ratio = own.double() / expected[name]
        ratios.append(ratio[expected[name] > 1e-6 * expected[name].max()])
    joined = torch.cat(ratios)  # the unit of the output is no part of it
    torch.testing.assert_close(joined, joined.mean().expand_as(joined), rtol=1e-4, atol=0)


def test_rows_that_nothing_reads_have_none(make_vit: MakeModel, make_images: MakeImages) -> None:
    found = importance(network_of(make_vit()), make_images(3))["blocks.1.mlp.fc2"]
    assert found.shape == (3, 17)
    assert (found[:, 0] > 0).all()  # the class token
    assert not found[:, 1:].any()


def test_a_layer_without_an_effect_is_left_out(make_vit: MakeModel, make_images: MakeImages) -> None:
    network = network_of(make_vit())
    layer: Any = network.model.get_submodule("blocks.1.mlp.fc2")
    nn.init.zeros_(layer.weight)
    found = importance(network, make_images(3))
    assert set(dict(network.weight_layers())) - set(found) == {"blocks.1.mlp.fc1"}


@pytest.mark.parametrize("size", [1, 2])
def test_batches_do_not_matter(size: int, make_swin: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of(make_swin()), make_images(5)
    whole = importance(network, images)
    for name, own in importance(network, *images.split(size)).items():
        torch.testing.assert_close(own, whole[name], rtol=1e-5, atol=1e-8)


def test_a_use_without_an_effect_counts_as_a_use(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of(make_vit()), make_images(3)
    head = network.model.get_submodule("head")

    def twice(_: nn.Module, batch: Tensor) -> Tensor:
        head(torch.zeros(2, 48, dtype=torch.float64))  # no gradient reaches it
        head(network.model.forward_features(batch)[:, 0])  # nothing reads it
        return network.model(batch)

    batches = CalibrationImages([images.double()])
    calls = importance_of_rows(dataclasses.replace(network, forward_all=twice), batches)["head"]
    assert [call.shape[0] for call in calls] == [2, 3, 3]
    assert [bool(call.any()) for call in calls] == [False, False, True]


def test_a_model_without_gradients_says_so(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of(make_vit()), make_images(3)

    def detached(_: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = network.model(batch)
        return output.detach()

    with pytest.warns(UserWarning, match="no layer has a finite gradient to the model's output"):
        assert not importance(dataclasses.replace(network, forward_all=detached), images)


def test_images_may_have_other_numbers_of_outputs(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of(make_vit()), make_images(3)
    whole = importance(network, images)

    def twice_unless_single(_: nn.Module, batch: Tensor) -> list[Tensor]:
        output = network.model(batch)
        return [output] if len(batch) == 1 else [output, 2 * output]

    found = importance(dataclasses.replace(network, forward_all=twice_unless_single), images)
    assert found.keys() == whole.keys()
    assert all(own.shape == whole[name].shape for name, own in found.items())


def test_the_model_stays_as_it_is(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of(make_vit()), make_images(2)
    network.model.blocks[0].requires_grad_(False)
    before = network.model(images.double())
    needed = [parameter.requires_grad for parameter in network.model.parameters()]
    importance(network, images)
    assert [parameter.requires_grad for parameter in network.model.parameters()] == needed
    assert all(parameter.grad is None for parameter in network.model.parameters())
    assert torch.equal(network.model(images.double()), before)
    assert all("forward" not in vars(module) for module in network.model.modules())
