"""Fixtures of the core's tests: calibration in batches against calibration in one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq.adapters import adapt
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
def walks() -> Callable[[nn.Module, Tensor], None]:
    """Asserts that a calibration in batches goes along the trunk."""
    return _assert_walks


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
