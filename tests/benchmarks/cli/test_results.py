"""Measured records can be listed, shown and taken elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.run.store import ResultStore


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    store = ResultStore(tmp_path / "runs")
    for seed, top1 in enumerate((90.125, 91.5)):
        fields = {"task": "classification", "model": "bundled_vit", "data": "bundled", "method": "base_ptq"}
        cell = Cell.create(**fields, seed=seed, method_arguments=(("range", "mse"),))
        environment = {"commit": "0123456789" * 4, "torch": "2.0"}
        record = {"config": cell.config, "provenance": {}, "metrics": {"top1": top1}, "environment": environment}
        store.put(cell, {**record, "cost": {"size": 1.5}, "finished": f"2024-01-0{2 - seed}"})
    lost = {"error": "out of memory", "environment": None, "finished": "2024-01-03"}  # its process was killed
    store.put_failure(Cell.create(**fields, seed=2), lost)
    (store.failures / "0.json").write_text("{}")
    return store


def test_records_are_listed_in_the_order_measured(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "list", "--store", str(store.directory)]) == 0
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert "top1" in heading
    assert "box_ap" not in heading
    assert [row.split("|")[2].strip() for row in rows] == ["measured", "measured", "failed"]
    assert [row.split("|")[8].strip() for row in rows] == ["91.50", "90.12", ""]
    assert "01234567 " in rows[0]


def test_a_record_is_shown_by_the_beginning_of_its_id(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    (file, _) = sorted(store.records.iterdir())
    assert main(["results", "show", file.stem[:10], "--store", str(store.directory)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_records_are_exported(store: ResultStore, suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"results{suffix}"
    assert main(["results", "export", str(file), "--store", str(store.directory)]) == 0
    frame = pd.read_csv(file) if suffix == ".csv" else pd.read_parquet(file)
    assert frame["top1"].tolist()[:2] == [91.5, 90.125]
    assert frame["method_arguments"].tolist()[:2] == ["range=mse"] * 2
    assert frame["cost.size"].tolist()[:2] == [1.5, 1.5]
    assert frame["error"].tolist()[2] == "out of memory"


def test_a_cell_without_an_applicable_method_is_listed(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell.create(task="classification", model="bundled_vit", data="bundled", method="repq_vit")
    store.put(cell, {"config": cell.config, "provenance": {}, "not_applicable": "no LayerNorm", "finished": "2024-02"})
    assert main(["results", "list", "--store", str(store.directory)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split("|")[2].strip() == "n/a"


def merge(*stores: ResultStore, into: Path) -> list[str]:
    return ["results", "merge", *(str(store.directory) for store in stores), "--store", str(into)]


def test_stores_are_merged_and_nothing_is_overwritten(
    store: ResultStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ResultStore(tmp_path / "other")
    into = tmp_path / "into"
    cell = Cell.create(
        task="classification",
        model="bundled_vit",
        data="bundled",
        method="base_ptq",
        method_arguments=(("range", "mse"),),
    )
    other.put(cell, {"config": cell.config, "provenance": {"code": "other"}, "metrics": {"top1": 50.0}})
    other.put(cell, {"config": cell.config, "provenance": {}, "metrics": {"top1": 51.0}})  # measured here too
    (other.records / "damaged.json").write_text("{")
    (other.records / "newer.json").write_text(json.dumps({"schema": 3}))

    assert main(merge(store, into=into)) == 0
    assert capsys.readouterr().out == f"{into}: 2 new, 0 already there, 0 skipped\n"
    before = {path.name: path.read_bytes() for path in (into / "records").iterdir()}
    assert before == {path.name: path.read_bytes() for path in store.records.iterdir()}

    assert main(merge(other, into=into)) == 0
    out, err = capsys.readouterr()
    assert out == f"{into}: 1 new, 1 already there, 2 skipped\n"
    assert [line.split(other.directory.name)[1] for line in err.splitlines()] == [
        "/records/damaged.json is damaged; it is skipped",
        "/records/newer.json has schema 3, this version writes 2; it is skipped",
    ]
    after = {path.name: path.read_bytes() for path in (into / "records").iterdir()}
    assert {name: after[name] for name in before} == before
    assert sorted(record["metrics"]["top1"] for record in ResultStore(into).known(cell)) == [50.0, 90.125]
    assert (other.records / "damaged.json").exists()

    assert main(merge(other, store, into=into)) == 0
    assert capsys.readouterr().out == f"{into}: 0 new, 4 already there, 2 skipped\n"
    assert {path.name: path.read_bytes() for path in (into / "records").iterdir()} == after


def test_a_record_is_not_overwritten_by_another_of_its_name(store: ResultStore, tmp_path: Path) -> None:
    other = ResultStore(tmp_path / "other")
    (path, *_) = sorted(store.records.iterdir())
    record = json.loads(path.read_text())
    (other.records / path.name).write_text(json.dumps({**record, "provenance": {"code": "other"}}))
    before = path.read_bytes()
    assert main(merge(other, into=store.directory)) == 0
    assert path.read_bytes() == before
    assert len(list(store.records.iterdir())) == 3
    assert main(merge(other, into=store.directory)) == 0
    assert len(list(store.records.iterdir())) == 3


def test_a_store_that_is_not_there_is_not_merged(
    store: ResultStore, assert_refused: Callable[[Sequence[str], str], None], tmp_path: Path
) -> None:
    none = str(tmp_path / "none")
    command = ["results", "merge", str(store.directory), none, "--store", str(tmp_path / "into")]
    assert_refused(command, f"there are no records in {none}")
    assert not (tmp_path / "into").exists()


def test_mistakes_are_one_line(
    store: ResultStore, assert_refused: Callable[[Sequence[str], str], None], tmp_path: Path
) -> None:
    out = ["--store", str(store.directory)]
    for identity in ("zzz", "/tmp", "../records/"):
        assert_refused(["results", "show", identity, *out], f"has no record whose id begins with {identity}")
    assert_refused(["results", "show", "", *out], "there is an empty text after show")
    assert_refused(["results", "export", str(tmp_path / "a.xls"), *out], "exports are .csv or .parquet")
    assert_refused(["results", "export", str(tmp_path / "none" / "a.csv"), *out], "there is no directory")
    assert_refused(["results", "list", "--store", str(tmp_path / "none")], "there are no records in")
    assert not (tmp_path / "none").exists()
