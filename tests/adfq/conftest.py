"""Fixtures of the core's tests: calibration in batches against calibration in one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.adapters import adapt, create, describe
from adfq.bits import Bits
from adfq.calibration import CalibrationImages
from adfq.method import Run
from adfq.quantizers import Quantizer
from adfq.registry import create_method
from adfq.sites import is_within

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "base_ptq": ("base_ptq", {}),
    "repq_vit": ("repq_vit", {}),
    "adfq_vit, calibrated": ("adfq_vit", {"iterations": 0}),
    "adfq_vit, optimized": ("adfq_vit", {"iterations": 2, "optimize_batch_size": 2}),
}


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    """A key of SETTINGS: method and options."""
    return str(request.param)


@pytest.fixture(scope="session")
def same_in_batches() -> Callable[[nn.Module, Tensor, str, int | list[int]], None]:
    """Asserts that batches of some sizes give what one batch gives."""
    return _assert_same_in_batches


@pytest.fixture(scope="session")
def comes_back() -> Callable[..., Any]:
    """Saves a quantized model, asserts that it is loaded bit for bit, and returns the loaded one."""
    return _assert_comes_back


@pytest.fixture(scope="session")
def refuses_mutations() -> Callable[[Path], None]:
    """Asserts that a saved file with a changed byte is refused, 500 times."""
    return _assert_mutations_are_refused


@pytest.fixture(scope="session")
def refuses_forgery() -> Callable[[nn.Module, tuple[str, ...], Any, str], None]:
    """Asserts that a model's description with another value at a path is refused."""
    return _assert_forgery_is_refused


@pytest.fixture(scope="session")
def walks() -> Callable[[nn.Module, Tensor], None]:
    """Asserts that a calibration in batches goes along the trunk."""
    return _assert_walks


def _assert_comes_back(
    quantized: nn.Module, file: Path, run: Callable[[nn.Module, Tensor], Any], images: Tensor
) -> nn.Module:
    adfq.save(quantized, file)
    loaded = adfq.load(file)
    expected, found = quantized.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    with torch.no_grad():
        for one, other in zip(run(loaded, images), run(quantized, images), strict=True):
            assert torch.equal(one, other)
    return loaded


def _assert_mutations_are_refused(file: Path) -> None:
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(content), (500,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 + position % 255
        file.write_bytes(damaged)
        with pytest.raises(AdfqError, match=r"damaged|not written|header"):
            adfq.load(file)


def _assert_forgery_is_refused(model: nn.Module, path: tuple[str, ...], value: Any, message: str) -> None:
    described = describe(model)
    arguments: Any = copy.deepcopy(dict(described.arguments))
    part = arguments
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(AdfqError, match=message):
        create(replace(described, arguments=arguments))


def _assert_same_in_batches(model: nn.Module, images: Tensor, setting: str, sizes: int | list[int]) -> None:
    """Compare batches to one batch.

    In double precision the sums of one image and of several round to the same floats, so that no code flips. Seldom one
    lies so close between two floats that a range is the other one.
    """
    method, options = SETTINGS[setting]
    model, images = copy.deepcopy(model).double(), images.double()
    whole = adfq.quantize(model, method, 4, 4, images, **options)
    in_batches = adfq.quantize(model, method, 4, 4, list(images.split(sizes)), **options)
    expected, found = whole.state_dict(), in_batches.state_dict()
    ranges = [
        f"{name}.{key}"
        for name, module in whole.named_modules()
        if isinstance(module, Quantizer)
        for key in module.state_dict()
    ]
    assert ranges
    assert list(found) == list(expected)
    assert len([name for name in ranges if not torch.equal(found[name], expected[name])]) <= 1
    for name, tensor in expected.items():
        tolerance = {"rtol": 1.2e-7, "atol": 0.0} if name in ranges else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=f"{name}: {{}}".format)


def _assert_walks(model: nn.Module, images: Tensor) -> None:
    """Calibrate in batches, and check that units lie in series and that no module runs when a later one is at hand."""
    network = adapt(copy.deepcopy(model))
    last = len(network.trunk)
    places = [next((i for i, name in enumerate(network.trunk) if is_within(u, name)), last) for u in network.units]
    assert places == sorted(places)
    assert len(set(places)) > 2
    ran: list[int] = []
    for index, name in enumerate(network.trunk):
        module = network.model.get_submodule(name)
        module.forward = partial(_counted, ran, index, module.forward)  # type: ignore[method-assign]
    batches = CalibrationImages(images.split(1))
    create_method("adfq_vit", {"iterations": 0}).apply(network, Run(batches), Bits(4, 4))
    checked, walked = ran[:last], ran[last:]  # one image shows first whether this is a trunk
    assert checked == list(range(last))
    assert walked == sorted(walked)
    assert set(walked) == set(checked)


def _counted(ran: list[int], index: int, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    ran.append(index)
    return forward(*arguments, **keywords)
