"""Cells on a Ray cluster: the same records, and a machine that is lost loses none."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.run.scheduler import run_cells
from benchmarks.run.store import ResultStore

pytest.importorskip("ray")

CPU = torch.device("cpu")


@pytest.fixture
def cluster(fault_methods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of a CPU each, whose processes know the methods of `fault_methods`, beside a head that runs nothing."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", f"{fault_methods}:{Path.cwd()}")
    monkeypatch.setenv("FAULT_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


def cell(seed: int, method: str = "slow") -> Cell:
    fields = {"task": "classification", "model": "bundled_vit", "data": "bundled", "calibration_size": 2, "limit": 4}
    return Cell.create(method=method, seed=seed, **fields)


@pytest.mark.slow
def test_the_cells_of_a_node_that_is_killed_run_again(cluster: Any, tmp_path: Path) -> None:
    from benchmarks.run.executors.ray import RayExecutor

    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    log = tmp_path / "log"

    def kill_a_node() -> None:
        while not log.exists() or len(log.read_text().split()) < 2:  # until both nodes measure
            time.sleep(0.1)
        cluster.remove_node(nodes[1], allow_graceful=False)
        (tmp_path / "hurry").touch()

    executor = RayExecutor(CPU, 0.1, cluster.address)
    try:
        assert executor.slots == 2
        thread = threading.Thread(target=kill_a_node)
        thread.start()
        cells = [cell(0, "base_ptq"), *(cell(seed) for seed in range(3)), cell(0, "broken")]
        outcomes = dict(run_cells(cells, ResultStore(tmp_path), executor))
        records = [outcomes[cell] for cell in cells]
        thread.join()
    finally:
        executor.close()
    assert [record is None for record in records] == [False, False, False, False, True]
    assert len(log.read_text().split()) == 4  # three cells, and the one that was lost once more
    assert records[0] is not None
    assert records[1] is not None
    assert records[0]["metrics"] == records[1]["metrics"]  # slow is base PTQ that takes its time
    assert len(list((tmp_path / "records").iterdir())) == 4


@pytest.mark.slow
def test_a_table_on_a_cluster_goes_on_where_it_stopped(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.add_node(num_cpus=1)
    table = ["table", "1", "--models", "bundled_vit", "--methods", "base_ptq", "--seeds", "0", "--limit", "4"]
    small = [*table, "--bits", "W4A4", "--calibration-size", "2", "--store", str(tmp_path / "runs")]
    assert main([*small, "--executor", "ray", "--address", cluster.address]) == 0
    text = capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "records").iterdir()}
    assert len(times) == 2
    assert main([*small, "--jobs", "0"]) == 0  # elsewhere, from the same store
    assert capsys.readouterr().out == text
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.slow
def test_after_ctrl_c_the_same_command_goes_on(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.add_node(num_cpus=1)
    log, store = tmp_path / "log", tmp_path / "runs"
    # What stands last is measured first.
    table = ["table", "1", "--models", "bundled_vit", "--methods", "slow", "base_ptq", "--seeds", "0", "--limit", "4"]
    command = [*table, "--bits", "W4A4", "--calibration-size", "2", "--store", str(store)]
    command += ["--executor", "ray", "--address", cluster.address]

    def press() -> None:
        while not log.exists():  # until the slow one is being measured
            time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    try:
        thread.start()
        assert main(command) == 130
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in (store / "records").iterdir()}
    assert len(times) == 1

    (tmp_path / "hurry").touch()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert len(list((store / "records").iterdir())) == 3


@pytest.mark.slow
def test_a_cluster_without_a_gpu_is_one_clear_error(cluster: Any) -> None:
    from benchmarks.run.executors.ray import RayExecutor

    cluster.add_node(num_cpus=1)
    with pytest.raises(AdfqError, match="the Ray cluster has no cuda"):
        RayExecutor(torch.device("cuda"), 1, cluster.address)


@pytest.mark.slow
def test_a_gpu_has_its_share_of_the_cores(cluster: Any) -> None:
    from benchmarks.run.executors.ray import RayExecutor

    cluster.add_node(num_cpus=5, num_gpus=2)
    executor = RayExecutor(torch.device("cuda"), None, cluster.address)
    executor.close()
    assert (executor.slots, executor.cores) == (2, 2)


def test_mistakes_are_one_line(assert_refused: Callable[[Sequence[str], str], None], tmp_path: Path) -> None:
    table = ["table", "1", "--methods", "base_ptq", "--store", str(tmp_path)]
    assert_refused([*table, "--address", "127.0.0.1:1"], "add --executor ray")
    assert_refused([*table, "--executor", "ray", "--jobs", "2"], "leave --jobs out")
    assert_refused(
        [*table, "--executor", "ray", "--address", "127.0.0.1:1"], "cannot reach the Ray cluster 127.0.0.1:1"
    )
