"""What has been measured can be listed, shown and taken elsewhere."""

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
    store.put_failure(Cell.create(**fields, seed=2), {"error": "out of memory", "finished": "2024-01-03"})
    return store


def test_records_are_listed_in_the_order_measured(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["results", "list", "--out", str(store.directory)]) == 0
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert "top1" in heading
    assert "box_ap" not in heading
    assert [row.split("|")[2].strip() for row in rows] == ["measured", "measured", "failed"]
    assert [row.split("|")[8].strip() for row in rows] == ["91.50", "90.12", ""]
    assert "01234567 " in rows[0]


def test_a_record_is_shown_by_the_beginning_of_its_id(store: ResultStore, capsys: pytest.CaptureFixture[str]) -> None:
    (file, _) = sorted(store.records.iterdir())
    assert main(["results", "show", file.stem[:10], "--out", str(store.directory)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_records_are_exported(store: ResultStore, suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    file = tmp_path / f"results{suffix}"
    assert main(["results", "export", str(file), "--out", str(store.directory)]) == 0
    frame = pd.read_csv(file) if suffix == ".csv" else pd.read_parquet(file)
    assert frame["top1"].tolist()[:2] == [91.5, 90.125]
    assert frame["method_arguments"].tolist()[:2] == ["range=mse"] * 2
    assert frame["cost.size"].tolist()[:2] == [1.5, 1.5]
    assert frame["error"].tolist()[2] == "out of memory"


def test_mistakes_are_one_line(
    store: ResultStore, assert_refused: Callable[[Sequence[str], str], None], tmp_path: Path
) -> None:
    out = ["--out", str(store.directory)]
    assert_refused(["results", "show", "zzz", *out], "has no record whose id begins with zzz")
    assert_refused(["results", "export", str(tmp_path / "a.xls"), *out], "exports are .csv or .parquet")
    assert_refused(["results", "export", str(tmp_path / "none" / "a.csv"), *out], "there is no directory")
    assert_refused(["results", "list", "--out", str(tmp_path / "none")], "there are no records in")
    assert not (tmp_path / "none").exists()
