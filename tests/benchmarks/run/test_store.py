"""Nothing recorded is lost, and nothing damaged or outdated is used."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.run.store import ResultStore

PROVENANCE = {"code": "a", "weights": "b"}


@pytest.fixture
def cell() -> Cell:
    return Cell.create(task="classification", model="bundled_vit", data="bundled", method="base_ptq")


@pytest.fixture
def record(cell: Cell) -> dict[str, Any]:
    return {"schema": 2, "config": cell.config, "provenance": PROVENANCE, "metrics": {"top1": 1.25}}


def test_what_was_put_is_found(tmp_path: Path, cell: Cell, record: dict[str, Any]) -> None:
    assert ResultStore(tmp_path).get(cell, PROVENANCE) is None
    ResultStore(tmp_path).put(cell, record)
    assert ResultStore(tmp_path).get(cell, PROVENANCE) == record


def test_a_record_of_other_code_or_weights_does_not_count(tmp_path: Path, cell: Cell, record: dict[str, Any]) -> None:
    store = ResultStore(tmp_path)
    store.put(cell, record)
    other = {**record, "provenance": {**PROVENANCE, "code": "changed"}, "metrics": {"top1": 2.5}}
    assert store.get(cell, other["provenance"]) is None
    store.put(cell, other)
    assert store.get(cell, other["provenance"]) == other
    assert store.get(cell, PROVENANCE) == record  # stays


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"config": {}}'])
def test_a_damaged_record_is_set_aside_and_said(
    tmp_path: Path, cell: Cell, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ResultStore(tmp_path)
    path = store.records / f"{cell.id}-0123abcd.json"
    path.write_text(content)
    assert store.get(cell, PROVENANCE) is None
    assert not path.exists()
    assert path.with_suffix(".damaged").read_text() == content
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("correct", "usable"),
    [
        ({"top1": "gA=="}, True),  # the first of eight
        ({}, True),
        ({"top1": "wA=="}, False),  # two of eight, which is not 12.5 %
        ({"top1": "gAA="}, False),  # sixteen
        ({"top1": "g"}, False),
        ({"top5": "gA=="}, False),
        ("gA==", False),
    ],
)
def test_bits_that_are_not_those_of_the_metric_are_damage(
    tmp_path: Path, cell: Cell, record: dict[str, Any], correct: Any, usable: bool
) -> None:
    store = ResultStore(tmp_path)
    store.put(cell, {**record, "metrics": {"top1": 12.5, "images": 8}, "correct": correct})
    assert len(store.known(cell)) == usable


def test_a_record_of_a_newer_schema_is_left_alone(
    tmp_path: Path, cell: Cell, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    store = ResultStore(tmp_path)
    store.put(cell, record)
    (path,) = store.records.iterdir()
    newer = json.dumps({**record, "schema": 3})
    path.write_text(newer)  # by a version that names its files as this one does
    (store.records / f"{cell.id}-0123abcd.json").write_text(newer)
    assert store.get(cell, PROVENANCE) is None
    assert store.known(cell) == []
    err = capsys.readouterr().err
    assert "has schema 3, this version writes 2; records of newer schemas are left alone" in err
    assert err.count("\n") == 1
    store.put(cell, record)
    assert store.get(cell, PROVENANCE) == record
    assert path.read_text() == newer
    assert len(list(store.records.iterdir())) == 3


def test_a_record_of_the_older_schema_is_read_with_names_for_paths(
    tmp_path: Path, cell: Cell, record: dict[str, Any]
) -> None:
    older = {**record, "config": {**cell.config, "data": "folder:/x/imagenet", "checkpoint": "/x/vit.pth"}}
    older["config"]["task_arguments"] = [["prompts", "/x/found.json"]]
    del older["schema"]
    store = ResultStore(tmp_path)
    path = store.records / "0123456789abcdef-0123abcd.json"
    path.write_text(json.dumps(older))
    (read,) = store.find("0123")
    named = {"data": "imagenet", "checkpoint": "vit", "task_arguments": [["prompts", "found.json"]]}
    assert read == {**older, "config": {**older["config"], **named}}
    assert json.loads(path.read_text()) == older
    assert store.tabulate()["data"].tolist() == ["imagenet"]


def test_a_store_is_read_without_being_written(tmp_path: Path, cell: Cell, record: dict[str, Any]) -> None:
    with pytest.raises(AdfqError, match="there are no records in"):
        ResultStore(tmp_path / "none", create=False)
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "damaged.json").write_text("{")
    assert ResultStore(tmp_path, create=False).tabulate().empty
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["damaged.json", "records"]


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
    assert [path.suffix for path in store.records.iterdir()] == [".json"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdfqError, match="cannot write results"):
        ResultStore(tmp_path / "file" / "runs")


def test_a_folder_that_is_read_only_is_one_clear_error(tmp_path: Path, cell: Cell, record: dict[str, Any]) -> None:
    store = ResultStore(tmp_path)
    folders = [tmp_path, *(path for path in tmp_path.iterdir() if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    tmp_path.parent.chmod(0o755)
    user = os.geteuid()
    if user == 0:  # whom no permission stops
        os.seteuid(65534)
    try:
        with pytest.raises(AdfqError, match=r"cannot write results.*Permission denied"):
            store.lock(cell)
        with pytest.raises(AdfqError, match=r"cannot write a record.*Permission denied"):
            store.put(cell, record)
    finally:
        os.seteuid(user)
        for folder in folders:
            folder.chmod(0o755)


def test_a_locked_cell_is_another_processes(tmp_path: Path, cell: Cell) -> None:
    first, second = ResultStore(tmp_path), ResultStore(tmp_path)
    lock = first.lock(cell)
    assert lock is not None
    assert second.lock(cell) is None
    lock.release()
    again = second.lock(cell)
    assert again is not None
    again.release()


def test_results_are_a_table(tmp_path: Path, cell: Cell, record: dict[str, Any]) -> None:
    store = ResultStore(tmp_path)
    assert store.tabulate().empty
    failed = replace(cell, seed=1)
    store.put(cell, {**record, "cost": {"size": 0.25}, "finished": "2024-01-02T00:00:00+00:00"})
    store.put_failure(failed, {"error": "out of memory", "finished": "2024-01-01T00:00:00+00:00"})
    frame = store.tabulate()
    assert frame["status"].tolist() == ["failed", "measured"]
    assert frame["seed"].tolist() == [1, 0]
    assert frame.loc[1, ["method", "top1", "cost.size"]].tolist() == ["base_ptq", 1.25, 0.25]
    store.put(failed, {**record, "config": failed.config})
    assert store.tabulate()["status"].tolist() == ["measured", "measured"]
