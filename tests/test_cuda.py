"""Every method and every task on a GPU, beside the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq.method import FULL_PRECISION
from adfq.reconstruction import OptimizingMethod
from adfq.registry import find_method, methods
from benchmarks.cli.main import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

QUANTIZING = [name for name in methods() if name != FULL_PRECISION]
OPTIMIZING = [name for name in QUANTIZING if issubclass(find_method(name), OptimizingMethod)]

Make = Callable[..., nn.Module]


@pytest.fixture(params=["vit", "swin"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small transformer on the CPU."""
    made: nn.Module = request.getfixturevalue(f"make_{request.param}")()
    return made


def error(output: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two outputs."""
    return float((output.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", QUANTIZING)
def test_every_method_calibrates_as_on_the_cpu(
    method: str, model: nn.Module, quick: Mapping[str, dict[str, Any]], make_images: Callable[..., Tensor]
) -> None:
    images = make_images(8)
    expected = model(images)
    on_cpu = adfq.quantize(model, method, 6, 6, images, **quick[method])
    on_gpu = adfq.quantize(model.cuda(), method, 6, 6, images, **quick[method])
    assert all(tensor.is_cuda for tensor in (*on_gpu.parameters(), *on_gpu.buffers()))
    with torch.no_grad():
        loss, other = error(on_cpu(images), expected), error(on_gpu(images.cuda()), expected)
    # Sums are rounded in another order, so that single values take neighbouring codes.
    assert other == pytest.approx(loss, rel=0.25, abs=0.01)


@pytest.mark.parametrize("method", OPTIMIZING)
def test_every_optimization_gains_as_on_the_cpu(
    method: str, model: nn.Module, make_images: Callable[..., Tensor]
) -> None:
    images = make_images(8)
    expected = model(images).detach()
    options: dict[str, Any] = {"optimize_batch_size": 4, "iterations": 10}
    own = find_method(method).options()
    options |= {name: 10 for name in own if name.endswith("_iterations")}
    options |= {"reconstruct": True} if "reconstruct" in own else {}
    on_cpu = adfq.quantize(model, method, 4, 4, images, **options)
    on_gpu = adfq.quantize(model.cuda(), method, 4, 4, images, **options)
    with torch.no_grad():
        loss, other = error(on_cpu(images), expected), error(on_gpu(images.cuda()), expected)
    assert other <= 1.5 * loss


@pytest.mark.parametrize("method", ["adfq_vit", "base_ptq", "row_ridge"])
def test_a_model_quantized_on_a_gpu_is_saved_and_loaded(
    method: str, quick: Mapping[str, dict[str, Any]], make_vit: Make, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    images = make_images(8)
    model = adfq.quantize(make_vit().cuda(), method, 4, 4, images, **quick[method])
    adfq.save(model, tmp_path / "model.safetensors")
    loaded = adfq.load(tmp_path / "model.safetensors")
    assert not any(parameter.is_cuda for parameter in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded.cuda()(images.cuda()), model(images.cuda()))


@pytest.mark.parametrize(
    ("task", "model_name", "limit"),
    [
        ("classification", "bundled_vit", "64"),
        ("classification", "bundled_swin", "64"),
        ("detection", "bundled_mask_rcnn", "8"),
        ("segmentation", "bundled_sam", "8"),
    ],
)
@pytest.mark.parametrize("method", [FULL_PRECISION, *QUANTIZING])
def test_every_task_measures_on_a_gpu(
    task: str, model_name: str, limit: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = find_method(method).options()
    quick = {name: 2 for name in own if name.endswith("iterations")} | {"rounds": 1, "optimize_batch_size": 2}
    given = [f"{name}={value}" for name, value in quick.items() if name in own]
    command = ["run", task, "--model", model_name, "--data", "bundled", "--method", method]
    command += ["--limit", limit, "--device", "cuda", "--json"]
    command += [] if method == FULL_PRECISION else ["--bits", "W6A6", "--calibration-size", "4"]
    command += ["--method-arg", *given] if given else []
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["environment"]["device"] == torch.cuda.get_device_name()
    assert record["cost"]["evaluation_memory"] > 0
