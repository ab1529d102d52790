"""Cells run once, an interrupted run goes on where it stopped, and what fails is its cell alone."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import Future
from datetime import datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from adfq import AdfqError, NonFiniteError
from adfq.errors import NotApplicableError
from adfq.reconstruction.optimizer import Reconstruction
from benchmarks.cell import Cell
from benchmarks.run import measuring, provenance
from benchmarks.run.console import warn
from benchmarks.run.executors import local
from benchmarks.run.executors.local import Failure, InProcess, Job, LostWorkerError
from benchmarks.run.records import Record
from benchmarks.run.scheduler import run_cells, summarize_warnings
from benchmarks.run.store import ResultStore

CPU = torch.device("cpu")


def run(cells: list[Cell], directory: Path) -> list[Any]:
    """Return every cell's outcome, in the order given."""
    outcomes = dict(run_cells(cells, ResultStore(directory), InProcess(CPU)))
    return [outcomes[cell] for cell in cells]


def test_recorded_cells_do_not_run_again(subject: Any, cells: list[Cell], tmp_path: Path) -> None:
    first, second = run(cells, tmp_path), run(cells, tmp_path)
    assert len(subject.evaluated) == len(cells)
    assert [record["metrics"] for record in first] == [record["metrics"] for record in second]


def test_a_copy_of_the_data_elsewhere_is_not_measured_again(pictures: Path, tmp_path: Path) -> None:
    def measure(root: Path) -> Any:
        torch.manual_seed(0)  # of the model's weights
        cell = Cell.create(
            task="classification",
            model="vit_tiny_patch16_224",
            model_arguments=(("depth", 1), ("img_size", 32), ("num_classes", 2)),
            data=f"folder:{root}",
            method="base_ptq",
            calibration_size=2,
        )
        (record,) = run([cell], tmp_path / "runs")
        return record

    first = measure(pictures)
    copy = tmp_path / "elsewhere" / pictures.name
    shutil.copytree(pictures, copy)
    assert measure(copy) == first
    assert len(list((tmp_path / "runs" / "records").iterdir())) == 1
    (copy / "val" / "cat" / "picture.jpg").rename(copy / "val" / "cat" / "another.jpg")
    assert measure(copy)["provenance"] != first["provenance"]
    assert len(list((tmp_path / "runs" / "records").iterdir())) == 2


def test_cells_are_given_as_they_finish(subject: Any, cells: list[Cell], tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    outcomes = run_cells([cells[1], cells[0], cells[1]], store, InProcess(CPU))
    cell, first = next(outcomes)
    assert cell == cells[1]
    assert first is not None
    assert store.get(cell, first["provenance"]) == first  # it is recorded by then
    assert len(subject.evaluated) == 1
    assert [cell for cell, _ in outcomes] == [cells[0]]
    assert len(subject.evaluated) == 2


def test_a_run_that_is_left_frees_its_cells(subject: Any, cells: list[Cell], tmp_path: Path) -> None:
    outcomes = run_cells(cells, ResultStore(tmp_path), InProcess(CPU))
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]
    for cell in cells:
        lock = ResultStore(tmp_path).lock(cell)
        assert lock is not None
        lock.release()


def test_a_method_that_cannot_be_applied_is_an_outcome(
    subject: Any, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    original = measuring.quantize

    def refuse(model: Any, method: str, **arguments: Any) -> Any:
        if method != "base_ptq":
            return original(model, method, **arguments)
        asked.append(method)
        raise NotApplicableError("it has no LayerNorm")

    monkeypatch.setattr(measuring, "quantize", refuse)
    before, refused, after = run(cells, tmp_path)
    assert refused["not_applicable"] == "it has no LayerNorm"
    assert refused["config"] == cells[1].config
    assert refused["schema"] == 2
    assert "metrics" not in refused
    assert before["metrics"]
    assert after["metrics"]
    assert "failed" not in capsys.readouterr().err
    assert not list((tmp_path / "failures").iterdir())
    frame = ResultStore(tmp_path).tabulate().set_index("method")
    assert frame["status"].to_dict() == {"full_precision": "measured", "base_ptq": "n/a", "repq_vit": "measured"}
    assert frame["error"]["base_ptq"] == "it has no LayerNorm"
    assert run(cells, tmp_path)[1] == refused
    assert asked == ["base_ptq"]
    monkeypatch.setattr(provenance, "code_digest", lambda *_: "changed")
    assert run(cells, tmp_path)[1]["provenance"]["code"] == "changed"
    assert asked == ["base_ptq"] * 2


def test_every_record_has_the_warnings_of_its_cell(
    subject: Any, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = measuring.quantize

    def complain(*positional: Any, **arguments: Any) -> Any:
        warnings.warn("made 3 modules no better", stacklevel=1)
        return original(*positional, **arguments)

    def load(cell: Cell) -> Any:
        warn("it has random weights")
        return subject

    monkeypatch.setattr(measuring, "quantize", complain)
    monkeypatch.setattr(local, "load_subject", load)
    subject.raise_at = {1: MemoryError()}
    first, second, third = run(cells, tmp_path)
    assert second is None
    said = ["it has random weights", "made 3 modules no better"]
    assert [record["warnings"] for record in (first, third)] == [said, said]
    (failure,) = ResultStore(tmp_path).find(cells[1].id)
    assert failure["warnings"] == said
    assert "random" not in capsys.readouterr().err
    assert summarize_warnings([first, second, third]) == "2 of 3 cells had warnings; 'adfq results show ID' has them"


def test_a_cell_that_stands_twice_runs_once(subject: Any, cells: list[Cell], tmp_path: Path) -> None:
    records = run([cells[1], cells[0], cells[1]], tmp_path)
    assert len(subject.evaluated) == 2
    assert [record["config"] for record in records] == [cell.config for cell in (cells[1], cells[0], cells[1])]


def test_an_interrupted_run_continues(subject: Any, cells: list[Cell], tmp_path: Path) -> None:
    subject.raise_at = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(cells, tmp_path)
    results = run(cells, tmp_path)
    assert len(subject.evaluated) == len(cells)
    assert [record["config"] for record in results] == [cell.config for cell in cells]
    assert [record["metrics"]["top1"] for record in results] == [1.0, 2.0, 3.0]


def test_other_code_measures_again_and_loses_nothing(
    subject: Any, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cells[:1], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "code_digest", lambda *_: "changed")
        run(cells[:1], tmp_path)
    assert len(subject.evaluated) == 2
    assert [record["metrics"]["top1"] for record in run(cells[:1], tmp_path)] == [1.0]
    assert len(subject.evaluated) == 2


def test_other_data_are_said_and_not_mixed(
    subject: Any, cells: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(cells[:2], tmp_path)
    assert not any(record["warnings"] for record in first)
    assert summarize_warnings(first) is None
    subject.data_digests = {**subject.data_digests, "validation": "changed"}
    records = run(cells, tmp_path)
    assert capsys.readouterr().err == ""  # a line for each cell would bury the table
    assert summarize_warnings([*records, None]) == "2 of 4 cells had warnings; 'adfq results show ID' has them"
    assert {record["provenance"]["data"]["validation"] for record in records} == {"changed"}
    said = "the data of any are not those of earlier records, which do not count any more"
    assert [record["warnings"] for record in records] == [[said], [said], []]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory. Tried to allocate"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (NonFiniteError("head: the output is not finite"), "head: the output is not finite"),
    ],
)
def test_what_fails_is_recorded_and_the_rest_goes_on(
    error: Exception,
    said: str,
    subject: Any,
    cells: list[Cell],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    subject.raise_at = {1: error}
    first, second, third = run(cells, tmp_path)
    assert (first is None, second is None, third is None) == (False, True, False)
    assert f"base_ptq, W4/A4, seed 0 failed: {said}" in capsys.readouterr().err
    (failure,) = ResultStore(tmp_path).find(cells[1].id)
    assert said in failure["error"]
    assert "Traceback" in failure["details"]
    assert run(cells, tmp_path)[1]["config"] == cells[1].config  # is tried again
    assert len(subject.evaluated) == 3
    assert not list((tmp_path / "failures").iterdir())


def test_a_mistake_ends_the_run_and_frees_its_cell(subject: Any, cells: list[Cell], tmp_path: Path) -> None:
    subject.raise_at = {1: AdfqError("no such images")}
    with pytest.raises(AdfqError, match="no such images"):
        run(cells, tmp_path)
    lock = ResultStore(tmp_path).lock(cells[1])
    assert lock is not None
    lock.release()


def test_a_clock_that_goes_back_changes_nothing(
    subject: Any, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Backwards(datetime):
        calls = 0

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            cls.calls += 1
            return datetime(2020, 1, 1, tzinfo=tz) - timedelta(days=cls.calls)

    monkeypatch.setattr("benchmarks.run.records.datetime", Backwards)
    records = run(cells, tmp_path)
    assert Backwards.calls == len(cells)
    assert all(seconds >= 0 for record in records for seconds in record["timing"].values())
    assert run(cells, tmp_path) == records
    assert len(subject.evaluated) == len(cells)
    assert len(ResultStore(tmp_path).tabulate()) == len(cells)


class Losing:
    """An executor that loses some cells' workers a few times."""

    def __init__(self, losses: dict[Cell, int], crowded: bool) -> None:
        self.slots, self.losses, self.crowded = 2, losses, crowded
        self.open: list[tuple[Job, Future[Record | Failure]]] = []
        self.together: list[set[Cell]] = []

    def submit(self, job: Job) -> Future[Record | Failure]:
        future: Future[Record | Failure] = Future()
        self.open.append((job, future))
        Thread(target=self._end, args=(job, future)).start()
        return future

    def _end(self, job: Job, future: Future[Record | Failure]) -> None:
        self.together.append({job.cell for job, future in self.open if not future.done()})
        if self.losses.get(job.cell, 0) > 0:
            self.losses[job.cell] -= 1
            future.set_exception(LostWorkerError("lost", self.crowded))
        else:
            future.set_result({"config": job.cell.config, "provenance": {}, "metrics": {}})

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("crowded", "losses", "fails"), [(True, 1, False), (True, 2, True), (False, 3, False), (False, 4, True)]
)
def test_a_cell_that_loses_its_worker_is_measured_again(
    crowded: bool, losses: int, fails: bool, cells: list[Cell], tmp_path: Path
) -> None:
    executor = Losing({cells[0]: losses}, crowded)
    outcomes = dict(run_cells(cells, ResultStore(tmp_path), executor))
    assert [outcomes[cell] is None for cell in cells] == [fails, False, False]
    if crowded:
        assert executor.together[-1] == {cells[0]}


def test_a_record_of_an_optimized_model_has_its_modules_errors(subject: Any, tmp_path: Path) -> None:
    cell = adfq_cell()
    (record,) = run([cell], tmp_path)
    assert set(record["report"]["modules"]) >= {"patch_embed", "blocks.0.attn", "blocks.0.mlp", "head"}
    assert record["cost"]["outliers"] >= 0
    assert record["cost"]["size"] < sum(parameter.nbytes for parameter in subject.model.parameters()) / 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failures", "locks", "records", "unfinished"]
    assert not list((tmp_path / "unfinished").iterdir())


def adfq_cell() -> Cell:
    options = (("iterations", 2), ("optimize_batch_size", 2))
    fields = {"task": "classification", "model": "any", "data": "any", "calibration_size": 2}
    return Cell.create(method="adfq_vit", method_arguments=options, **fields)


def test_an_interrupted_optimization_goes_on_within_its_cell(
    subject: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    original = Reconstruction.run

    def run_module(self: Any, done: Any) -> Any:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(type(self.unit.module).__name__)
        return original(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "run", run_module)
        with pytest.raises(KeyboardInterrupt):
            run([adfq_cell()], tmp_path)
        (unfinished,) = (tmp_path / "unfinished").iterdir()
        assert len(list(unfinished.iterdir())) == 2
        ran[:] = [""] * 3  # does not stop any more
        run([adfq_cell()], tmp_path)
    assert len(ran) - 3 == 4  # of six modules
    assert not unfinished.exists()
