"""Comparisons of exported models with the simulation, by task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adfq
from adfq import AdfqError, export_onnx
from benchmarks.studies import comparison
from benchmarks.tasks import task_of

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_features_are_compared_at_the_size_of_the_images(make_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    images = torch.randn(6, 3, 32, 32)
    model = adfq.quantize(make_vit(depth=1, num_classes=0), "base_ptq", 8, 8, images)
    assert task_of(model) == "encoders"
    export_onnx(model, tmp_path / "vit")
    subject: Any = SimpleNamespace(evaluation_images=lambda count: images[:count])
    kind = comparison.kind_of("encoders")
    found = kind.compare(model, [tmp_path / "vit"], subject, 100, 1)
    assert found["images"] == 4
    assert 0 <= found["error_0"] < 5
    assert kind.describe({"images": 4, "error_0": 1.23456}).endswith("by 1.235 % (relative error) on 4 images")
    assert comparison.size_of(kind, subject, 2) is None
    assert comparison.size_of(comparison.kind_of("detection"), subject, 2) == (32, 32)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)  # no longer the exported model
    assert kind.compare(model, [tmp_path / "vit"], subject, 2, 1)["error_0"] > 5


def test_other_tasks_have_no_comparison() -> None:
    with pytest.raises(AdfqError, match="models of task depth cannot be compared"):
        comparison.kind_of("depth")


def test_empty_masks_agree() -> None:
    tools = pytest.importorskip("pycocotools.mask")
    empty, full = (tools.encode(np.asfortranarray(np.full((3, 4), value, np.uint8))) for value in (0, 1))
    assert [comparison._iou(*pair) for pair in ((empty, empty), (empty, full), (full, full))] == [1, 0, 1]


def test_an_exported_sam_gets_boxes_as_corners() -> None:
    encode = comparison._Prompts()
    box = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    point: tuple[Tensor, Tensor] = torch.tensor([[[5.0, 6.0]]]), torch.ones(1, 1)
    assert [part.tolist() for part in encode(None, box, None)] == [[[[1, 2], [3, 4]]], [[2, 3]]]
    assert [part.tolist() for part in encode(point, None, None)] == [[[[5, 6], [0, 0]]], [[1, -1]]]
    assert [part.tolist() for part in encode(point, box, None)] == [[[[5, 6], [1, 2], [3, 4]]], [[1, 2, 3]]]
