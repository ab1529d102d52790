"""Plans are measured table after table, what takes longest first, and read without measuring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adfq.errors import AdfqError
from benchmarks.plan import Plan, PlannedTable, Selection, make_plan
from benchmarks.run import plans
from benchmarks.run.executors.local import InProcess
from benchmarks.run.plans import TableResults, read_plan, run_plan, status_of
from benchmarks.run.store import ResultStore

pytestmark = pytest.mark.usefixtures("methods_read_once")


def plan_of(*bits: str, methods: Sequence[str] = ("base_ptq",)) -> Plan:
    """A plan of table 1 once for each bit-width, with the bundled ViT."""
    tables: list[PlannedTable] = []
    for each in bits:
        chosen = {"models": ["bundled_vit"], "methods": methods, "bits": [each], "calibration_size": 2}
        tables += make_plan(["1"], Selection(**chosen)).tables
    return Plan(tables)


def test_a_table_comes_as_soon_as_its_cells_are_done(subject: Any, tmp_path: Path) -> None:
    plan = plan_of("W4A4", "W3A3")
    tables = run_plan(plan, tmp_path, InProcess(torch.device("cpu")))
    first = next(tables)
    assert len(subject.evaluated) == 2  # full precision and base PTQ of the first table
    assert [outcome is not None and status_of(outcome) for _, outcome in first.results] == ["measured"] * 2
    (second,) = tables
    assert len(subject.evaluated) == 3  # full precision was measured
    assert second.results[0][1] == first.results[0][1]


def test_what_takes_longest_comes_first_within_its_table() -> None:
    plan = plan_of("W4A4", "W3A3", methods=["base_ptq", "adfq_vit", "ptq4vit"])
    found = [(cell.method, cell.bits) for cell in plans._order(plan)]
    first = [("adfq_vit", "W4/A4"), ("ptq4vit", "W4/A4"), ("base_ptq", "W4/A4"), ("full_precision", "W32/A32")]
    second = [("adfq_vit", "W3/A3"), ("ptq4vit", "W3/A3"), ("base_ptq", "W3/A3")]
    assert found == [*first, *second]


def test_warnings_are_one_line_a_table(
    subject: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, warned = plan_of("W4A4"), {"warnings": ["a", "b"], "metrics": {}}
    monkeypatch.setattr("benchmarks.run.scheduler.run_cells", lambda cells, *_: ((cell, warned) for cell in cells))
    (results,) = run_plan(plan, tmp_path, InProcess(torch.device("cpu")))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("adfq: table 1: 2 of 2 cells had warnings")
    assert results.count("measured") == 2


def test_a_failed_an_inapplicable_and_a_missing_cell_are_told_apart(tmp_path: Path) -> None:
    plan = plan_of("W4A4", methods=["base_ptq", "repq_vit", "ptq4vit"])
    full, failed, inapplicable, _ = (entry.cell for entry in plan.tables[0].entries)
    store = ResultStore(tmp_path)
    store.put(full, {"config": full.config, "provenance": {}, "metrics": {"top1": 90.0, "images": 5}})
    store.put_failure(failed, {"error": "out of memory"})
    store.put(inapplicable, {"config": inapplicable.config, "provenance": {}, "not_applicable": "no LayerNorm"})
    before = sorted(tmp_path.rglob("*"))
    (results,) = read_plan(plan, tmp_path)
    assert [status_of(outcome) for _, outcome in results.results] == ["measured", "failed", "n/a", "missing"]
    text = results.render()
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        *("90.00", "failed", "n/a", "")
    ]
    assert "n/a, not applicable: RepQ-ViT of bundled_vit: no LayerNorm." in text
    assert "1 of 4 cells has no record." in text
    assert sorted(tmp_path.rglob("*")) == before
    assert isinstance(results, TableResults)


def test_a_store_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdfqError, match="there are no records in"):
        read_plan(plan_of("W4A4"), tmp_path)
