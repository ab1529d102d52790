"""Inputs of layers whose channels have mean 0 and less different spreads."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.calibration import CalibrationImages
from adfq.reconstruction import importance_of_rows
from adfq.sites import POST_NORM_ROLES, Network
from adfq.transforms.activations import scaled_activations
from adfq.transforms.reparameterization import norms_with_readers
from adfq.transforms.shared import weight_layer
from adfq.transforms.standardization import standardize_inputs

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]

MODELS = ["vit", "swin", "padded swin"]


def network_of(kind: str, make_vit: MakeModel, make_swin: MakeModel) -> Network:
    model = make_vit() if kind == "vit" else make_swin(img_size=32 if kind == "swin" else 24)
    return adapt(copy.deepcopy(model).double())


def inputs_of(network: Network, images: Tensor) -> dict[str, Tensor]:
    """Return the inputs of layers behind a LayerNorm, the heads of an attention or a GELU, rows×channels."""
    readers = {layer for group in norms_with_readers(network, POST_NORM_ROLES) for layer in group.layers}
    readers |= {weight_layer(network.model, heads.proj) for heads in network.heads}
    readers |= {layer for _, layer in network.weight_layers() if layer.role == "fc2"}
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found.update({name: inputs[0].flatten(0, -2)}))
        for name, layer in network.weight_layers()
        if layer in readers
    ]
    with torch.no_grad():
        network.run(images)
    for hook in hooks:
        hook.remove()
    assert {name.rpartition(".")[2] for name in found} >= {"qkv", "proj", "fc1", "fc2"}
    return found


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_channels_have_no_mean_and_the_root_of_their_spread(
    kind: str, weighted: bool, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    network, images = network_of(kind, make_vit, make_swin), make_images(4, 24 if "padded" in kind else 32).double()
    batches = CalibrationImages([images])
    expected, before = network.run(images), inputs_of(network, images)
    weights = importance_of_rows(network, batches) if weighted else {}
    standardize_inputs(network, batches, weights)
    torch.testing.assert_close(network.run(images), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.run(images[:1] * 2), network.run(images[:1].mul(2)), rtol=1e-9, atol=1e-9)
    for name, after in inputs_of(network, images).items():
        share = weights[name][0].flatten().double() if weighted else torch.ones(len(after)).double()
        share /= share.sum()
        spreads = []
        for rows in (before[name], after):
            mean = share @ rows
            spreads.append((share @ (rows - mean).square()).sqrt())
        if not name.endswith("fc2"):  # GELU's means stay
            assert mean.abs().max() < 1e-9 * spreads[1].max()
        product = spreads[1] / spreads[0].sqrt()
        torch.testing.assert_close(product, product[:1].expand_as(product), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_other_images_give_the_same_output(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    network, size = network_of(kind, make_vit, make_swin), 24 if "padded" in kind else 32
    others = make_images(3, size, seed=2).double()
    expected = network.run(others)
    standardize_inputs(network, CalibrationImages(make_images(4, size).double().split(3)), {})
    torch.testing.assert_close(network.run(others), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_constant_channel_keeps_its_unit(make_vit: MakeModel, make_images: MakeImages) -> None:
    network, images = network_of("vit", make_vit, make_vit), make_images(4).double()
    norm = network.model.get_submodule("blocks.0.norm1")
    assert isinstance(norm, nn.LayerNorm)
    norm.weight[[1, 5]] = 0
    layer = network.model.get_submodule("blocks.0.attn.qkv")
    kept = layer.weight[:96, [1, 5]].clone()  # of queries and keys; the values' change with the layer behind them
    expected = network.run(images)
    standardize_inputs(network, CalibrationImages([images]), {})
    torch.testing.assert_close(network.run(images), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.weight[:96, [1, 5]], kept)
    assert not inputs_of(network, images)["blocks.0.attn.qkv"][:, [1, 5]].any()


@pytest.mark.parametrize("between", [nn.ReLU(), nn.LayerNorm(192)])
@torch.no_grad()
def test_an_mlp_with_something_behind_its_gelu_stays(
    between: nn.Module, make_vit: MakeModel, make_images: MakeImages
) -> None:
    network, images = network_of("vit", make_vit, make_vit), make_images(4).double()
    mlp = network.model.get_submodule("blocks.0.mlp")
    mlp.norm = between.double()
    expected, kept = network.run(images), mlp.get_submodule("fc2").get_parameter("weight").clone()
    standardize_inputs(network, CalibrationImages([images]), {})
    torch.testing.assert_close(network.run(images), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(mlp.get_submodule("fc2").get_parameter("weight"), kept)
    assert "blocks.0.mlp" not in scaled_activations(network.model)
    assert "blocks.1.mlp" in scaled_activations(network.model)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_an_attention_without_biases_gets_them(bias: bool, make_vit: MakeModel, make_images: MakeImages) -> None:
    model = make_vit(qkv_bias=bias, proj_bias=bias).double()
    network, images = adapt(model), make_images(4).double()
    expected = network.run(images)
    standardize_inputs(network, CalibrationImages([images]), {})
    torch.testing.assert_close(network.run(images), expected, rtol=1e-9, atol=1e-9)
    assert inputs_of(network, images)["blocks.0.attn.proj"].mean(0).abs().max() < 1e-9
