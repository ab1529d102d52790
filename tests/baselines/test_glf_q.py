"""GLF-Q: its parts take effect, it lowers its loss, it is saved and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError
from adfq.quantizers import UniformQuantizer
from adfq.transforms.relu import substituted
from adfq.transforms.streams import mapped_norms
from baselines.glf_q import GLFQ

MakeModel = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]

QUICK: dict[str, Any] = {"iterations": 4, "mlp_iterations": 3, "optimize_batch_size": 4, "range": "percentile"}

pytestmark = pytest.mark.filterwarnings("ignore:optimization made these modules no better")


@pytest.mark.parametrize("kind", ["vit", "swin", "features"])
def test_it_runs_is_saved_and_resumed(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages, tmp_path: Path
) -> None:
    model = make_swin() if kind == "swin" else make_vit(num_classes=0 if kind == "features" else 10)
    images = make_images(8)
    found, again = (adfq.quantize(model, GLFQ(**QUICK), 4, 4, images, resume=tmp_path / "kept") for _ in range(2))
    report: Any = found.quantization.report  # type: ignore[union-attr]
    assert list(report["mlps"]) == substituted(found)
    assert len(report["mlps"]) == (4 if kind == "swin" else 2)
    assert list(report.get("unrotated", ())) == (["layers.0"] if kind == "swin" else [])
    assert mapped_norms(found) == (["norm"] if kind == "features" else [])
    adfq.save(found, tmp_path / "model.safetensors")
    loaded = adfq.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images), found(images))
        assert torch.equal(again(images), found(images))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_reconstruction_lowers_its_loss_and_the_error_of_the_output(
    kind: str, make_vit: MakeModel, make_swin: MakeModel, make_images: MakeImages
) -> None:
    small: dict[str, Any] = {"img_size": 16, "depths": (1, 1)}
    model, images = (make_vit(), make_images(16)) if kind == "vit" else (make_swin(**small), make_images(16, 16))
    rates: dict[str, Any] = {"weight_learning_rate": 2e-3, "step_learning_rate": 1e-3}
    options: dict[str, Any] = {"relu": False, "optimize_batch_size": 8, "range": "percentile", **rates}
    plain, found = (
        adfq.quantize(model, GLFQ(iterations=iterations, **options), 3, 3, images) for iterations in (0, 40)
    )
    results = found.quantization.report["modules"]  # type: ignore[union-attr, operator]
    assert sum(result["after"] < result["before"] for result in results.values()) >= len(results) - 1
    assert not substituted(plain)
    with torch.no_grad():
        expected = model(images)
        assert (found(images) - expected).norm() < 0.8 * (plain(images) - expected).norm()


def test_norms_are_reparameterized_where_no_stream_is_rotated(make_swin: MakeModel, make_images: MakeImages) -> None:
    found: Any = adfq.quantize(make_swin(), GLFQ(iterations=0, range="percentile"), 4, 4, make_images(4))
    norm = found.layers[1].blocks[0].norm1
    assert not (norm.weight == 1).any()  # neither folded nor as it was
    quantizer = found.layers[1].blocks[0].attn.qkv.input_quantizer
    assert isinstance(quantizer, UniformQuantizer)
    assert quantizer.scale.numel() == 1


def test_rotations_can_be_left_out(make_vit: MakeModel, make_images: MakeImages) -> None:
    models: list[Any] = [
        adfq.quantize(make_vit(), GLFQ(iterations=0, range="percentile", rotations=rotations), 8, 8, make_images(4))
        for rotations in (False, True)
    ]
    assert [bool((model.blocks[0].norm1.weight == 1).all()) for model in models] == [False, True]
    with torch.no_grad():
        outputs = [model(make_images(4)) for model in models]
    assert (outputs[0] - outputs[1]).norm() < 0.1 * outputs[0].norm()


@pytest.mark.parametrize(
    "options", [{"range": "wide"}, {"local_weight": 0.0}, {"mlp_iterations": -1}, {"weight_learning_rate": -1.0}]
)
def test_bad_options_are_one_clear_line(options: dict[str, Any]) -> None:
    with pytest.raises(AdfqError, match=next(iter(options))):
        GLFQ(**options)
