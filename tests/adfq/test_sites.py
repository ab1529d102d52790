"""Recipes and what they attach to a network's sites."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adfq import AdfqError
from adfq.adapters import adapt
from adfq.layers import QuantWeightLayer
from adfq.quantizers import LogQuantizer, UniformQuantizer
from adfq.sites import ROLES, Recipe, sites_of

MakeModel = Callable[..., nn.Module]


def nothing() -> None:
    return None


@pytest.mark.parametrize("where", ["activations", "weights"])
def test_a_recipe_for_a_role_that_does_not_exist(where: str) -> None:
    with pytest.raises(AdfqError, match=r"'fc3'; there are .*fc1, fc2") as error:
        Recipe(nothing, nothing, **{where: {"fc1": nothing, "fc3": nothing}})
    assert all(role in str(error.value) for role in ROLES)


def test_a_role_has_its_own_quantizer_or_the_default(make_vit: MakeModel) -> None:
    recipe = Recipe(
        activation=lambda: UniformQuantizer(4),
        weight=lambda: UniformQuantizer(5, "row"),
        activations={"probs": lambda: LogQuantizer(3), "head": nothing},
        weights={"head": lambda: UniformQuantizer(8)},
    )
    found = {(site.role, site.is_weight): recipe.quantizer_of(site) for site in sites_of(adapt(make_vit()).model)}
    assert isinstance(found["probs", False], LogQuantizer)
    assert found["head", False] is None
    bits = {key: quantizer.bits for key, quantizer in found.items() if quantizer is not None}
    assert (bits["qkv", False], bits["qkv", True], bits["head", True]) == (4, 5, 8)


def test_every_site_gets_its_roles_quantizers_of_its_own(make_vit: MakeModel) -> None:
    network = adapt(make_vit())
    network.attach(
        Recipe(
            activation=lambda: UniformQuantizer(4),
            weight=lambda: UniformQuantizer(5, "row"),
            activations={"probs": lambda: LogQuantizer(3), "qkv": nothing},
            weights={"head": nothing},
        )
    )
    sites = [site for site in sites_of(network.model) if not site.is_weight and site.quantizer is not None]
    found = {site.name: (site.role, site.quantizer) for site in sites}
    assert [role for role, _ in found.values()].count("probs") == 2
    assert "qkv" not in {role for role, _ in found.values()}
    assert len({id(quantizer) for _, quantizer in found.values()}) == len(found) == 16
    for name, (role, quantizer) in found.items():
        assert network.model.get_submodule(name) is quantizer
        assert quantizer.bits == (3 if role == "probs" else 4)
        assert not quantizer.is_calibrated
    for _, layer in network.weight_layers():
        assert isinstance(layer.weight_quantizer, nn.Identity if layer.role == "head" else UniformQuantizer)


def test_attaching_again_replaces_what_was_there(make_vit: MakeModel, make_images: Callable[..., Tensor]) -> None:
    images = make_images()
    network = adapt(make_vit())
    plain = network.model(images)
    network.attach(Recipe(lambda: UniformQuantizer(2), lambda: UniformQuantizer(2, "row")))
    with pytest.raises(RuntimeError, match="before it is calibrated"):
        network.model(images)
    network.attach(Recipe(nothing, nothing))
    assert network.activation_quantizers() == {}
    assert torch.equal(network.model(images), plain)


def test_names_lead_to_the_modules(make_swin: MakeModel) -> None:
    network = adapt(make_swin())
    names = [name for name, _ in network.weight_layers()] + [name for name, _ in network.matmuls()]
    assert len(set(names)) == len(names)
    for name, layer in [*network.weight_layers(), *network.matmuls()]:
        assert network.model.get_submodule(name) is layer
    assert {layer.role for _, layer in network.weight_layers() if isinstance(layer, QuantWeightLayer)} <= set(ROLES)
    assert {role for _, matmul in network.matmuls() for role in matmul.roles} == {"query", "key", "probs", "value"}
