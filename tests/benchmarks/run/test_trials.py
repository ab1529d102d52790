"""Trials of a cell: smaller calibrations, reasons why it cannot be measured, and memory as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adfq.errors import NotApplicableError
from benchmarks.bundled import BUNDLED
from benchmarks.cell import Cell
from benchmarks.run import trials
from benchmarks.run.measuring import quantize_model
from benchmarks.run.rehearsal import Size, measure
from benchmarks.run.trials import TOO_LARGE, Stage, shorten, size_of

CPU = torch.device("cpu")


def cell_of(method: str, **fields: Any) -> Cell:
    chosen = {"task": "classification", "model": "any", "data": "any", "calibration_size": 64, **fields}
    return Cell.create(method=method, **chosen)


def test_batches_shrink_in_proportion() -> None:
    options = (("held_back", 0.1), ("iterations", 50), ("optimize_batch_size", 8))
    cell = cell_of("adfq_vit", calibration_batch_size=32, method_arguments=options)
    assert size_of(cell) == Size(32, 64, 50)
    small = shorten(cell, Size(8, 16, 3))
    assert (small.calibration_size, small.calibration_batch_size) == (16, 8)
    assert dict(small.method_arguments) == {"held_back": 0.0, "iterations": 3, "optimize_batch_size": 2}
    assert shorten(cell, Size(1, 2, 1)).calibration_batch_size == 1


def test_all_iterations_shrink_in_proportion() -> None:
    whole = shorten(cell_of("aphq_vit"), Size(16, 64, 5))
    assert {name: value for name, value in whole.method_arguments if "iterations" in name} == {
        "iterations": 5,
        "mlp_iterations": 5,
    }
    longer = cell_of("aphq_vit", method_arguments=(("iterations", 10), ("mlp_iterations", 2000)))
    assert dict(shorten(longer, Size(16, 64, 3)).method_arguments)["mlp_iterations"] == 600


def test_one_batch_stays_one() -> None:
    cell = cell_of("ptq4vit", method_arguments=(("gradient_batch_size", 128),))
    assert size_of(cell) == Size(64, 64)
    small = shorten(cell, Size(8, 8))
    assert (small.calibration_size, small.calibration_batch_size) == (8, None)
    assert dict(small.method_arguments)["gradient_batch_size"] == 8


def test_an_optimization_that_is_left_out_is_not_tried() -> None:
    cell = cell_of("adfq_vit", method_arguments=(("iterations", 0),))
    assert size_of(cell).iterations == 0
    assert dict(shorten(cell, Size(4, 4)).method_arguments)["iterations"] == 0


@pytest.fixture
def stage(subject: Any, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(trials, "load_subject", lambda cell: subject)
    return Stage(CPU)


def test_a_cell_is_evaluated_on_few_images(stage: Stage, subject: Any) -> None:
    trial = stage.rehearse(cell_of("base_ptq", calibration_size=2), 0.0)
    assert trial.evaluation_images == 7
    assert trial.calibration is not None
    assert trial.evaluation is not None
    assert trial.model == pytest.approx(trials._size(subject.model), rel=0.5)
    assert stage.rehearse(cell_of("full_precision", limit=3), 0.0).evaluation_images == 3
    assert stage.rehearse(cell_of("full_precision", limit=3), 0.0).calibration is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), TOO_LARGE),
        (MemoryError(), TOO_LARGE),
        (RuntimeError("a shape\n  is wrong"), "a shape is wrong"),
    ],
)
def test_a_failure_is_a_refusal(stage: Stage, subject: Any, error: Exception, reason: str) -> None:
    subject.raise_at[0] = error
    assert stage.rehearse(cell_of("full_precision"), 0.0).refusal == reason


def test_an_inapplicable_method_is_no_refusal(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise NotApplicableError("it has no attention")

    monkeypatch.setattr(trials, "quantize_model", refuse)
    trial = stage.rehearse(cell_of("base_ptq", calibration_size=2), 0.0)
    assert (trial.not_applicable, trial.refusal) == ("it has no attention", None)


def test_too_few_images_are_a_refusal() -> None:
    cell = cell_of("base_ptq", model="bundled_vit", data=BUNDLED, calibration_size=10**6)
    reason = Stage(CPU).rehearse(cell, 0.0).refusal
    assert reason is not None
    assert "1000000 calibration images were asked for" in reason


def test_weights_that_would_be_downloaded_are_random(pictures: Any) -> None:
    arguments = (("depth", 1), ("img_size", 32), ("num_classes", 2))
    fields = {"model": "vit_tiny_patch16_224", "model_arguments": arguments, "data": f"folder:{pictures}"}
    loaded = Stage(CPU).load([cell_of("full_precision", pretrained=True, **fields)], [[]])
    assert loaded.refusal is None
    assert "has random weights" in loaded.notes[0]


@pytest.mark.usefixtures("few_scenes")
def test_weights_that_a_task_does_not_download_are_a_refusal() -> None:
    pytest.importorskip("segment_anything")
    cell = cell_of("full_precision", task="segmentation", model="bundled_sam", data=BUNDLED, pretrained=True)
    loaded = Stage(CPU).load([cell], [[]])
    assert loaded.usable
    assert loaded.refusal is not None
    assert "are not downloaded" in loaded.refusal


def test_memory_is_near_that_of_a_whole_calibration() -> None:
    fields = {"calibration_size": 16, "calibration_batch_size": 8, "limit": 1}
    cell = cell_of("repq_vit", model="bundled_vit", data=BUNDLED, **fields)
    stage = Stage(CPU)
    trial = stage.rehearse(cell, 0.0)
    whole = measure(lambda folder: quantize_model(cell, stage._load(cell), CPU, folder), CPU)
    assert trial.calibration is not None
    assert 1 / 2 < trial.calibration.memory / whole.memory < 2
    assert 1 / 2 < trial.calibration.resume / whole.resume < 2
