"""Fixtures of the reconstruction's tests: units of the golden network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adfq.adapters import adapt
from adfq.calibration import CalibrationImages
from adfq.calibration.walk import Walk
from adfq.reconstruction import Unit
from adfq.reconstruction.examples import collect
from adfq.sites import Network

LoadGolden = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def golden_vit(load_golden: LoadGolden) -> nn.Module:
    """The network of the golden vectors."""
    file = load_golden("repq_e2e_vit_21.npz")
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    model.load_state_dict({key[6:]: value for key, value in file.items() if key.startswith("state/")})
    return model.eval()


@pytest.fixture(scope="session")
def walk_units() -> Callable[..., Iterator[Unit]]:
    """A walk through a network that yields units, with their targets and the rest of the network."""
    return _walk_units


def _walk_units(model: nn.Module, images: Tensor, names: tuple[str, ...], size: int = 5) -> Iterator[Unit]:
    network: Network = adapt(copy.deepcopy(model))
    network.model.requires_grad_(False)
    batches = CalibrationImages([images]).split(size)
    walks = Walk(network, batches, full_precision=True), Walk(network, batches)
    with torch.no_grad():
        for parts in zip(*(walk.parts() for walk in walks), strict=True):
            for name in names:
                if name == parts[0].name or name.startswith(f"{parts[0].name}.") or not parts[0].name:
                    module = network.model.get_submodule(name)
                    examples, places = collect([module, module], walks, parts)
                    rest = walks[0].rest(module), batches.sizes, walks[0].feature(module)
                    unit = Unit(network, name, examples, places, [len(images)], size, None, *rest)
                    unit.set_targets(module, unit.sites)
                    names = tuple(other for other in names if other != name)
                    yield unit
