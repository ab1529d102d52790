"""A forecast counts cells and images, knows those that are measured, and says what will not fit; it writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loky.process_executor import BrokenProcessPool

from adfq.errors import AdfqError
from benchmarks.plan import Plan, Selection, make_plan
from benchmarks.report.forecast import duration, render_forecast
from benchmarks.run import forecast as module
from benchmarks.run import trials
from benchmarks.run.executors.local import InProcess
from benchmarks.run.forecast import Forecast, RowForecast, forecast, gigabytes
from benchmarks.run.plans import run_plan
from benchmarks.run.rehearsal import Cost
from benchmarks.run.store import ResultStore
from benchmarks.run.trials import Loaded, Trial

pytestmark = pytest.mark.usefixtures("methods_read_once")

CPU = torch.device("cpu")


def plan_of(*bits: str, methods: Sequence[str] = ("base_ptq",), **chosen: Any) -> Plan:
    fields = {"models": ["bundled_vit"], "methods": methods, "bits": bits, "calibration_size": 2, **chosen}
    return make_plan(["1"], Selection(**fields))


@pytest.fixture
def free_subject(subject: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(trials, "load_subject", lambda cell: subject)
    return subject


def test_cells_and_images_are_counted(free_subject: Any, tmp_path: Path) -> None:
    plan = plan_of("W4A4", "W3A3", methods=["base_ptq", "repq_vit"], seeds=[0, 1], limit=5)
    found = forecast(plan, tmp_path / "none", CPU, jobs=0, seconds=0.0)
    assert [(row.method, row.cells) for row in found.rows] == [
        *(("Full precision", 1), ("Base PTQ", 4), ("RepQ-ViT", 4))
    ]
    assert (found.cells, found.measured) == (9, 0)
    assert found.calibration_images == 8 * 2
    assert found.evaluation_images == 9 * 5
    assert found.seconds > 0
    assert not found.misfits
    assert not found.refusals
    assert list(tmp_path.iterdir()) == []


def test_cells_that_are_measured_do_not_count(free_subject: Any, tmp_path: Path) -> None:
    plan = plan_of("W4A4", "W3A3")
    list(run_plan(plan_of("W4A4"), tmp_path, InProcess(CPU)))
    before = sorted(tmp_path.rglob("*"))
    found = forecast(plan, ResultStore(tmp_path, create=False), CPU, jobs=0, seconds=0.0)
    assert [(row.cells, row.measured) for row in found.rows] == [(0, 1), (1, 1)]
    assert [row.seconds is None for row in found.rows] == [True, False]
    assert sorted(tmp_path.rglob("*")) == before
    free_subject.weights_digest = "others"
    assert forecast(plan, tmp_path, CPU, jobs=0, seconds=0.0).measured == 0


def test_a_model_that_cannot_be_loaded_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(cell: Any) -> None:
        raise AdfqError("the checkpoint is damaged")

    monkeypatch.setattr(trials, "load_subject", refuse)
    found = forecast(plan_of("W4A4"), tmp_path, CPU, jobs=0)
    assert found.refusals == [f"Bundled ViT, {row.method}: the checkpoint is damaged" for row in found.rows]
    assert found.cells == 2
    json.dumps(found.to_json(), allow_nan=False)


def test_a_process_that_is_lost_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Pool:
        """A pool whose process loads a model, and dies of a method."""

        def submit(self, function: Any, device: str, *arguments: Any) -> Pool:
            self.loading = function is trials.load_in_process
            return self

        def result(self) -> Loaded:
            if self.loading:
                return Loaded(1.0, 100.0, 100.0, [False, False], ["it has random weights"])
            raise BrokenProcessPool

        def shutdown(self, **_: Any) -> None:
            pass

    monkeypatch.setattr(module, "open_pool", lambda *_: Pool())
    found = forecast(plan_of("W4A4"), tmp_path, CPU, jobs=1)
    assert len(found.refusals) == 2
    assert "one image at a time does not fit memory: its process was killed" in found.refusals[0]
    assert found.notes == ["it has random weights"]


def made(*rows: RowForecast, **fields: Any) -> Forecast:
    chosen: dict[str, Any] = {
        "device": "cpu",
        "environment": {"processor": "a processor", "device": "cpu", "threads": 2},
        **{"jobs": 1, "jobs_a_device": 1, "available_memory": 8e3, "available_host_memory": 8e3},
        **{"free_resume": 20e3, "free_temporary": 1e3, "loading": 10.0, "took": 60.0, "notes": []},
    }
    return Forecast(rows, **{**chosen, **fields})


ROW = RowForecast("ViT", "AMO", 3, 1, 32, 500, 100.0, 3000.0, 3000.0, 2000.0, 500.0, 100.0, 200.0)


def test_totals_are_those_of_cells_to_measure() -> None:
    found = made(ROW, replace(ROW, cells=0, measured=4, seconds=None), jobs=2)
    assert (found.cells, found.measured, found.calibration_images, found.evaluation_images) == (3, 5, 96, 1500)
    assert found.seconds == 10 + 300 / 2
    assert found.most("memory", 2) == 6000
    assert found.most("memory", 5) == 9000


def test_what_does_not_fit_is_named() -> None:
    assert made(ROW).misfits == []
    assert made(replace(ROW, memory=9e3)).misfits == ["ViT, AMO: 9.0 GB of memory, 8.0 GB are free"]
    assert made(replace(ROW, temporary=2e3)).misfits == [
        "ViT, AMO: 2.0 GB of disk for temporary files, 1.0 GB are free"
    ]
    assert made(replace(ROW, resume=3e4)).misfits == ["ViT, AMO: 30.0 GB of disk in the store, 20.0 GB are free"]
    assert made(replace(ROW, cells=0, memory=9e3)).misfits == []
    (line,) = made(ROW, jobs=3, jobs_a_device=3).misfits
    assert line == "3 cells at once: 9.0 GB of memory, 8.0 GB are free; --jobs sets another number"
    on_gpu = made(replace(ROW, host_memory=9e3), device="cuda")
    assert on_gpu.misfits == ["ViT, AMO: 9.0 GB of memory of this machine, 8.0 GB are free"]


def test_a_forecast_is_a_table_with_totals() -> None:
    rows = [
        ROW,
        replace(ROW, method="PTQ4ViT", seconds=None, memory=None, not_applicable="no logits"),
        replace(ROW, method="Broken", seconds=None, memory=None, refusal="it is broken"),
        replace(ROW, method="Big", memory=9e3),
    ]
    text = render_forecast(made(*rows, notes=["ViT has random weights"]))
    table, totals, *rest = text.split("\n\n")
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0] == [
        *("Model", "Method", "Cells", "Measured", "Calibration images", "Evaluation images"),
        *("Memory", "Disk", "Time a cell"),
    ]
    assert lines[2] == ["ViT", "AMO", "3", "1", "32", "500", "3.0 GB", "0.3 GB", "2 min"]
    assert lines[3][-3:] == ["", "", "n/a"]
    assert lines[4][-3:] == ["", "", ""]
    assert totals.startswith("16 cells, of which 4 are measured and 12 would run, one at a time.")
    assert "384 calibration images and 6,000 evaluation images" in totals
    assert rest == [
        *("Will not fit:", "- ViT, Big: 9.0 GB of memory, 8.0 GB are free"),
        *("Cannot be measured:", "- ViT, Broken: it is broken", "ViT has random weights"),
    ]
    assert "GPU memory" in render_forecast(made(ROW, device="cuda"))


def test_an_unknown_memory_is_none() -> None:
    class Place:
        def rehearse(self, *_: Any) -> Trial:
            unknown = Cost(1.0, float("nan"), float("nan"), 0.0, 0.0)
            return Trial(unknown, unknown, 7, 1.0)

    entries = plan_of("W4A4").tables[0].entries[1:]
    place: Any = Place()
    loaded = Loaded(1.0, 1.0, 1.0, [False], [])
    row = module._forecast_row(place, entries, {entry.cell: False for entry in entries}, loaded, 1.0)
    assert (row.seconds, row.memory, row.host_memory, row.calibration_memory) == (2.0, None, None, None)
    json.dumps(made(row).to_json(), allow_nan=False)
    assert render_forecast(made(row)).splitlines()[2].split("|")[-4].strip() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40.2, "40 s"), (300, "5 min"), (11_500, "3.2 h"), (1_000_000, "12 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [gigabytes(size) for size in (None, 40.0, 1234.0, 1.234e6)] == ["", "0.0 GB", "1.2 GB", "1,234 GB"]
