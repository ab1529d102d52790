"""Cells run once, in order, and an interrupted run goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq import AdfqError
from benchmarks import runner
from benchmarks.cells import Cell
from benchmarks.results import ResultStore

CPU = torch.device("cpu")


class CountingSubject:
    """A task that costs nothing and counts what is asked of it."""

    weights_digest = "weights"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.evaluated: list[str] = []
        self.interrupt_at: int | None = None

    def calibration_images(self, count: int, seed: int) -> Tensor:
        return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    def evaluate(self, model: nn.Module, device: torch.device, limit: int | None, batch_size: int) -> dict[str, float]:
        if self.interrupt_at == len(self.evaluated):
            raise KeyboardInterrupt
        self.evaluated.append(type(model).__name__)
        return {"top1": float(len(self.evaluated)), "images": limit or 7}


@pytest.fixture
def subject(make_vit: Any, monkeypatch: pytest.MonkeyPatch) -> CountingSubject:
    subject = CountingSubject(make_vit())
    monkeypatch.setattr(runner, "load_subject", lambda cell: subject)
    return subject


@pytest.fixture
def cells() -> list[Cell]:
    fields = {"task": "classification", "model": "any", "data": "any", "calibration_size": 2}
    return [Cell.create(method=method, **fields) for method in ("full_precision", "base_ptq", "repq_vit")]


def test_recorded_cells_do_not_run_again(subject: CountingSubject, cells: list[Cell], tmp_path: Path) -> None:
    first = list(runner.run_cells(cells, ResultStore(tmp_path), CPU))
    second = list(runner.run_cells(cells, ResultStore(tmp_path), CPU))
    assert len(subject.evaluated) == len(cells)
    assert [record["metrics"] for _, record in first] == [record["metrics"] for _, record in second]


def test_an_interrupted_run_continues(subject: CountingSubject, cells: list[Cell], tmp_path: Path) -> None:
    subject.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        list(runner.run_cells(cells, ResultStore(tmp_path), CPU))
    subject.interrupt_at = None
    results = list(runner.run_cells(cells, ResultStore(tmp_path), CPU))
    assert len(subject.evaluated) == len(cells)
    assert [cell for cell, _ in results] == cells
    assert [record["metrics"]["top1"] for _, record in results] == [1.0, 2.0, 3.0]


def test_other_code_measures_again(
    subject: CountingSubject, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(runner.run_cells(cells[:1], ResultStore(tmp_path), CPU))
    monkeypatch.setattr(runner, "code_digest", lambda: "changed")
    list(runner.run_cells(cells[:1], ResultStore(tmp_path), CPU))
    assert len(subject.evaluated) == 2


def test_a_record_says_what_was_measured_with_what(subject: CountingSubject, cells: list[Cell]) -> None:
    record = runner.run_cell(cells[1], subject, CPU)
    assert record["config"] == cells[1].config
    assert record["environment"]["torch"] == torch.__version__
    assert record["provenance"] == runner.provenance(subject)
    assert set(record["timing"]) == {"calibration", "evaluation"}


def test_unknown_devices_are_one_clear_line() -> None:
    with pytest.raises(AdfqError, match="cannot use device 'abacus'"):
        runner.resolve_device("abacus")
    assert runner.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
