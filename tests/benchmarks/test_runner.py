"""Cells run once, in order, and an interrupted run goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adfq import AdfqError, reconstruction
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

    def evaluation_images(self, count: int) -> Tensor:
        return self.calibration_images(2, 0)

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        return model(images)

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
    assert record["provenance"] == runner.provenance(cells[1], subject)
    assert set(record["timing"]) == {"calibration", "evaluation"}
    assert record["cost"]["calibration_seconds"] == record["timing"]["calibration"] > 0
    assert record["cost"]["forward_seconds"] > 0
    assert "outliers" not in record["cost"]  # of per-patch quantizers alone


def test_a_record_of_an_optimized_model_has_its_modules_errors(subject: CountingSubject, tmp_path: Path) -> None:
    cell = adfq_cell()
    ((_, record),) = runner.run_cells([cell], ResultStore(tmp_path), CPU)
    assert set(record["report"]["modules"]) >= {"patch_embed", "blocks.0.attn", "blocks.0.mlp", "head"}
    assert record["cost"]["outliers"] >= 0
    assert record["cost"]["size"] < sum(parameter.nbytes for parameter in subject.model.parameters()) / 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records", "unfinished"]
    assert not list((tmp_path / "unfinished").iterdir())


def adfq_cell() -> Cell:
    options = (("iterations", 2), ("optimize_batch_size", 2))
    fields = {"task": "classification", "model": "any", "data": "any", "calibration_size": 2}
    return Cell.create(method="adfq_vit", method_arguments=options, **fields)


def test_an_interrupted_optimization_goes_on_within_its_cell(
    subject: CountingSubject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    original = reconstruction._Reconstruction.run

    def run(self: Any, done: Any) -> Any:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(type(self.module).__name__)
        return original(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction._Reconstruction, "run", run)
        with pytest.raises(KeyboardInterrupt):
            list(runner.run_cells([adfq_cell()], ResultStore(tmp_path), CPU))
        (unfinished,) = (tmp_path / "unfinished").iterdir()
        assert len(list(unfinished.iterdir())) == 2
        ran[:] = [""] * 3  # does not stop any more
        list(runner.run_cells([adfq_cell()], ResultStore(tmp_path), CPU))
    assert len(ran) - 3 == 4  # of six modules
    assert not unfinished.exists()


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    fields = {"task": "classification", "model": "embedded_vit", "data": "embedded", "calibration_size": 2, "limit": 4}
    cells = [Cell.create(method="base_ptq", bits=bits, **fields) for bits in ("W8/A8", "W2/A2")]
    alone, together = (list(runner.run_cells(cells, ResultStore(tmp_path / str(jobs)), CPU, jobs)) for jobs in (1, 2))
    assert [cell for cell, _ in together] == cells
    assert [record["metrics"] for _, record in alone] == [record["metrics"] for _, record in together]
    assert len(list((tmp_path / "2" / "records").iterdir())) == 2
    mistake = [Cell.create(method="base_ptq", method_arguments=(("range", "huge"),), **fields)]
    with pytest.raises(AdfqError, match="unknown range 'huge'"):
        list(runner.run_cells(mistake, ResultStore(tmp_path), CPU, 2))


def test_unknown_devices_are_one_clear_line() -> None:
    with pytest.raises(AdfqError, match="cannot use device 'abacus'"):
        runner.resolve_device("abacus")
    assert runner.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
