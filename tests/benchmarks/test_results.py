"""Nothing recorded is lost, and nothing damaged or outdated is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from adfq import AdfqError
from benchmarks.cells import Cell
from benchmarks.results import ResultStore

PROVENANCE = {"code": "a", "weights": "b"}


@pytest.fixture
def cell() -> Cell:
    return Cell.create(task="classification", model="embedded_vit", data="embedded", method="base_ptq")


@pytest.fixture
def record(cell: Cell) -> dict[str, Any]:
    return {"config": cell.config, "provenance": PROVENANCE, "metrics": {"top1": 1.25}}


def test_what_was_put_is_found(tmp_path: Path, cell: Cell, record: dict[str, Any]) -> None:
    assert ResultStore(tmp_path).get(cell, PROVENANCE) is None
    ResultStore(tmp_path).put(cell, record)
    assert ResultStore(tmp_path).get(cell, PROVENANCE) == record


def test_a_record_of_other_code_or_weights_does_not_count(tmp_path: Path, cell: Cell, record: dict[str, Any]) -> None:
    store = ResultStore(tmp_path)
    store.put(cell, record)
    assert store.get(cell, {**PROVENANCE, "code": "changed"}) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"config": {}}'])
def test_a_damaged_record_is_set_aside_and_said(
    tmp_path: Path, cell: Cell, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ResultStore(tmp_path)
    path = store.records / f"{cell.id}.json"
    path.write_text(content)
    assert store.get(cell, PROVENANCE) is None
    assert not path.exists()
    assert path.with_suffix(".damaged").read_text() == content
    assert "damaged" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_record_whole(
    tmp_path: Path, cell: Cell, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(tmp_path)
    store.put(cell, record)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(AdfqError, match="No space left"):
        store.put(cell, {**record, "metrics": {"top1": 2.5}})
    assert store.get(cell, PROVENANCE) == record
    assert [path.name for path in store.records.iterdir()] == [f"{cell.id}.json"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdfqError, match="cannot write results"):
        ResultStore(tmp_path / "file" / "runs")
