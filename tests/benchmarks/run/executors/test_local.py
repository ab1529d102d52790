"""Processes give what one process gives, share a machine, and take nothing with them when they die."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loky
import pytest
import torch

from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.run.executors import local as executors
from benchmarks.run.executors.local import (
    Executor,
    InProcess,
    Processes,
    count_processes,
    count_threads,
    create_local_executor,
)
from benchmarks.run.scheduler import run_cells
from benchmarks.run.store import ResultStore
from benchmarks.tasks.shared import count_workers

CPU = torch.device("cpu")


def cell(method: str = "base_ptq", bits: str = "W8/A8", **arguments: Any) -> Cell:
    fields = {"task": "classification", "model": "bundled_vit", "data": "bundled", "calibration_size": 2, "limit": 4}
    return Cell.create(method=method, bits=bits, method_arguments=tuple(arguments.items()), **fields)


def measure(cells: list[Cell], store: ResultStore, executor: Executor) -> list[Any]:
    """Return every cell's outcome, in the order given."""
    outcomes = dict(run_cells(cells, store, executor))
    return [outcomes[cell] for cell in cells]


def metrics(records: list[Any]) -> list[Any]:
    return [record["metrics"] for record in records]


@pytest.mark.slow
def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    cells = [cell(bits=bits) for bits in ("W8/A8", "W2/A2")]
    alone = measure(cells, ResultStore(tmp_path / "alone"), InProcess(CPU))
    executor = Processes(["cpu", "cpu"])
    try:
        together = measure(cells, ResultStore(tmp_path / "together"), executor)
        assert [record and record["metrics"] for record in alone] == [
            record and record["metrics"] for record in together
        ]
        share = max(1, min(loky.cpu_count() // 2, torch.get_num_threads()))
        assert {record["environment"]["threads"] for record in together if record} == {share}
        mistake = [cell(range="huge")]
        with pytest.raises(AdfqError, match="unknown range 'huge'"):
            measure(mistake, ResultStore(tmp_path / "together"), executor)
    finally:
        executor.close()


def test_a_process_reads_pictures_with_processes_of_its_own(pictures: Path, tmp_path: Path) -> None:
    reads = Cell.create(
        task="classification",
        model="vit_tiny_patch16_224",
        model_arguments=(("depth", 1), ("img_size", 32), ("num_classes", 2)),
        data=f"folder:{pictures}",
        method="base_ptq",
        calibration_size=2,
        limit=4,
    )
    executor = Processes(["cpu"])
    try:
        (record,) = measure([reads], ResultStore(tmp_path), executor)
    finally:
        executor.close()
    assert record is not None
    assert record["metrics"]["images"] == 2


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])  # more processes import torch
def test_processes_share_the_cores_and_a_killed_one_costs_its_own_cell_alone(
    again: bool, fault_methods: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, always = (
        cell("killed", times=1, log=str(tmp_path / "once")),
        cell("killed", times=9, log=str(tmp_path / "al")),
    )
    cells = [cell(), once, *([always] if again else []), cell(bits="W2/A2")]
    share = max(1, count_workers() // 2)
    executor = Processes(["cpu", "cpu"])
    try:
        assert executor._open().submit(count_workers).result() == share
        records = measure(cells, ResultStore(tmp_path), executor)
    finally:
        executor.close()
    assert (tmp_path / "once").read_text() == "xx"
    assert [record is None for record in records] == [each is always for each in cells]
    if not again:
        return
    assert "killed, W8/A8, seed 0 failed: its process was killed" in capsys.readouterr().err
    (failure,) = ResultStore(tmp_path).find(always.id)
    assert "killed" in failure["error"]


@pytest.mark.parametrize(("own", "slots", "threads"), [(16, 1, 16), (16, 3, 5), (16, 40, 1), (1, 1, 1), (4, 2, 4)])
def test_a_process_has_its_share_of_the_threads(
    monkeypatch: pytest.MonkeyPatch, own: int, slots: int, threads: int
) -> None:
    monkeypatch.setattr(executors.loky, "cpu_count", lambda: 16)
    monkeypatch.setattr(executors.torch, "get_num_threads", lambda: own)
    assert count_threads(slots) == threads


def test_memory_and_cores_decide_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors.loky, "cpu_count", lambda: 16)
    monkeypatch.setattr(executors.psutil, "virtual_memory", lambda: SimpleNamespace(available=10.5e9))
    assert [count_processes(memory) for memory in (None, 0.1, 2, 4, 50)] == [1, 16, 5, 2, 1]
    assert create_local_executor(CPU, None, 2).slots == 5
    assert create_local_executor(CPU, 3, 2).slots == 3
    assert isinstance(create_local_executor(CPU, 0, 2), InProcess)


def test_every_gpu_has_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name, jobs, devices in (
        ("cuda", None, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:1", None, ["cuda:1"]),
        ("cuda", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]),
    ):
        executor = create_local_executor(torch.device(name), jobs, 2)
        assert isinstance(executor, Processes)
        assert executor.free == devices
