"""The shipped SAM is what its description says: trained, small, and asked by boxes it finds objects."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("segment_anything")

from benchmarks.bundled.classifiers import WEIGHTS
from benchmarks.bundled.sams import CHECKPOINT
from benchmarks.cell import Cell
from benchmarks.tasks.segmentation.task import load_segmentation


def test_weights_are_small() -> None:
    assert CHECKPOINT.stat().st_size <= 6e6
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 25e6


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "least"), [("boxes", 75.0), ("points", 60.0)])
def test_full_precision_finds_objects(prompts: str, least: float) -> None:
    arguments = (("prompts", prompts),) if prompts != "boxes" else ()
    fields = {"task": "segmentation", "model": "bundled_sam", "data": "bundled", "method": "full_precision"}
    subject = load_segmentation(Cell.create(**fields, task_arguments=arguments))
    metrics = subject.evaluate(subject.model, torch.device("cpu"), 100, 1)
    assert metrics["images"] == 100
    assert metrics["mean_iou"] >= least
