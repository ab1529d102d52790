"""Parts of a reconstruction: blocks as units, the rest of a network, dropped quantization, trained weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq.adapters import adapt
from adfq.bits import Bits
from adfq.calibration import CalibrationImages, calibrate_activations, quantize_weights
from adfq.method import Run
from adfq.quantizers import UniformQuantizer
from adfq.reconstruction import Composition, Loss, OptimizerOptions, Unit, Weights, blocks_of, optimize_units
from baselines.base_ptq import BasePTQ
from baselines.qdrop import QDrop

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
WalkUnits = Callable[..., Iterator[Unit]]

pytestmark = pytest.mark.filterwarnings("ignore:optimization made these modules no better")


@pytest.fixture(params=["vit", "swin"])
def model(request: pytest.FixtureRequest, make_vit: MakeModel, make_swin: MakeModel) -> nn.Module:
    return {"vit": make_vit, "swin": make_swin}[request.param]()


def test_blocks_take_the_place_of_their_attentions_and_mlps(model: nn.Module) -> None:
    network = adapt(model)
    blocks = blocks_of(network)
    assert len(blocks) < len(network.units)
    for name, _ in (*network.weight_layers(), *network.matmuls()):
        assert sum(f"{name}.".startswith(f"{block}.") for block in blocks) == 1, name
    assert not any(name.endswith((".attn", ".mlp")) for name in blocks)


def test_the_rest_of_a_network_gives_its_output(
    model: nn.Module, make_images: MakeImages, walk_units: WalkUnits
) -> None:
    images = make_images(5)
    network = adapt(copy.deepcopy(model))
    with torch.no_grad():
        expected = model(images)
        for name in dict.fromkeys((*blocks_of(network), *network.units)):
            seen = 0
            for unit in walk_units(model, images, (name,), 3):
                outputs = [unit.rest(index, unit.targets(batch)) for index, batch in unit.rest_batches()]  # type: ignore[misc]
                torch.testing.assert_close(torch.cat(outputs), expected, rtol=1e-4, atol=1e-5)
                seen += 1
            assert seen == 1, name


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_elements_of_activations_are_not_quantized_at_random(
    probability: float, make_vit: MakeModel, make_images: MakeImages, walk_units: WalkUnits
) -> None:
    (unit,) = walk_units(make_vit(), make_images(4), ("blocks.0.mlp",))
    quantizer = UniformQuantizer(2).calibrate(torch.randn(100))
    unit.quantizers = {"site": quantizer}
    x = torch.randn(20000)
    with unit.dropped_quantization(probability):
        mixed = quantizer(x)
    assert float((mixed == x).float().mean()) == pytest.approx(probability, abs=0.02)
    assert bool(((mixed == x) | (mixed == quantizer(x))).all())
    assert not quantizer._forward_hooks


def train_weights(network: Any, images: Tensor, folder: Path | None = None, iterations: int = 20) -> dict[str, Any]:
    composition = Composition(
        losses=lambda unit: [Loss(unit)],
        trained=lambda unit: [Weights(unit, 1e-3, iterations)],
        mix_probability=1.0,
    )
    run = Run(CalibrationImages([images], folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return optimize_units(network, run, OptimizerOptions(iterations, 4), composition)


def calibrated(model: nn.Module, images: Tensor) -> Any:
    network = adapt(model)
    network.attach(BasePTQ().recipe(Bits(3, 3)))
    quantize_weights(network)
    calibrate_activations(network, Run(CalibrationImages([images])).images)
    return network


def test_weights_and_biases_are_trained_through_the_rounding(make_vit: MakeModel, make_images: MakeImages) -> None:
    images = make_images(8)
    network = calibrated(make_vit(), images)
    layer = dict(network.weight_layers())["blocks.0.mlp.fc1"]
    weight, bias, scale = (
        tensor.detach().clone() for tensor in (layer.weight, layer.bias, layer.weight_quantizer.scale)
    )
    results = train_weights(network, images)
    assert all(result.after < result.before for result in results.values() if result.kept)
    assert sum(result.kept for result in results.values()) >= len(results) - 1
    assert not torch.equal(layer.weight, weight)
    assert not torch.equal(layer.bias, bias)
    assert torch.equal(layer.weight_quantizer.scale, scale)
    assert layer.learned_weight is None
    assert not any(parameter.requires_grad for parameter in network.model.parameters())


def test_trained_weights_are_resumed(make_vit: MakeModel, make_images: MakeImages, tmp_path: Path) -> None:
    images = make_images(8)
    states = []
    for _ in range(2):
        network = calibrated(make_vit(), images)
        train_weights(network, images, tmp_path, iterations=5)
        states.append(network.model.state_dict())
        assert len(list(tmp_path.glob("*.safetensors"))) == len(blocks_of(network))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("options", [{}, {"mix_probability": 0.0, "drop_probability": 0.0}], ids=["QDrop", "BRECQ"])
def test_qdrop_lowers_the_error(options: dict[str, float], make_vit: MakeModel, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images(16)
    settings: dict[str, Any] = {"rounding_learning_rate": 3e-2, "step_learning_rate": 1e-3, "optimize_batch_size": 8}
    found = adfq.quantize(model, QDrop(iterations=60, **settings, **options), 3, 3, images)
    plain = adfq.quantize(model, QDrop(iterations=0), 3, 3, images)
    with torch.no_grad():
        expected = model(images)
        assert (found(images) - expected).norm() < 0.95 * (plain(images) - expected).norm()
