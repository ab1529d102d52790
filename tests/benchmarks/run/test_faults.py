"""Records stay, whatever happens to the process that wrote them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.run.store import ResultStore

TABLE = ["table", "1", "--models", "bundled_vit", "--bits", "W4A4", "--seeds", "0", "--limit", "4"]


COMMAND = [*TABLE, "--calibration-size", "2", "--jobs", "0"]


@pytest.fixture
def start(fault_methods: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `adfq table 1` on tmp_path/runs, where methods that take their time, or die, have a name."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.cli", *TABLE, "--calibration-size", "2", *arguments]
        path = os.pathsep.join([str(fault_methods), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "FAULT_LOG": str(tmp_path / "log")}
        return subprocess.Popen(
            [*command, "--store", str(tmp_path / "runs")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def records(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "runs" / "records").glob("*.json")}


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def calls(tmp_path: Path) -> list[str]:
    log = tmp_path / "log"
    return log.read_text().split() if log.exists() else []


def test_a_killed_table_goes_on_with_its_records(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT_LOG", str(tmp_path / "log"))
    first = start("--methods", "slow", "base_ptq", "--jobs", "1")
    wait_for(lambda: calls(tmp_path) == ["slow"] or first.poll() is not None)  # base PTQ is recorded, this one runs
    before = records(tmp_path)
    assert len(before) == 1
    workers = psutil.Process(first.pid).children(recursive=True)
    assert workers
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    (tmp_path / "hurry").touch()
    assert main([*COMMAND, "--methods", "slow", "base_ptq", "--store", str(tmp_path / "runs")]) == 0
    after = records(tmp_path)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    assert calls(tmp_path) == ["slow", "slow"]


@pytest.mark.slow
def test_two_tables_on_one_store_share_the_work(start: Any, tmp_path: Path) -> None:
    (tmp_path / "hurry").touch()
    both = [start("--methods", "slow", "base_ptq", "--seeds", "0", "1", "--jobs", "0") for _ in range(2)]
    outs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outs[0] == outs[1]
    assert calls(tmp_path) == ["slow", "slow"]  # one call a seed
    assert len(records(tmp_path)) == 5


@pytest.mark.usefixtures("fault_methods")
def test_a_failed_cell_is_said_in_the_table_and_by_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--methods", "broken", "base_ptq", "--store", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert "broken, W4/A4, seed 0 failed: MemoryError" in error
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert "failed" in next(row for row in rows if "broken" in row)
    assert "failed" not in next(row for row in rows if "Base PTQ" in row)
    assert "Failed, and left out of every number: broken W4/A4 of bundled_vit, seed 0." in out


WRITE = """
import os, signal, sys
from pathlib import Path
from benchmarks.cell import Cell
from benchmarks.run.store import ResultStore
cell = Cell.create(task="classification", model="bundled_vit", data="bundled", method="base_ptq")
store, record = ResultStore(Path(sys.argv[1])), {"config": cell.config, "provenance": {}, "metrics": {"top1": 1.0}}
store.put(cell, record)
{fault}
store.put(cell, {**record, "report": "x" * 100_000})
"""


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        # A full disk takes the beginning of a file.
        (
            "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))",
            1,
        ),
    ],
)
def test_a_write_that_ends_midway_leaves_the_old_record(fault: str, code: int, tmp_path: Path) -> None:
    script = WRITE.replace("{fault}", fault)
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == code, process.stderr
    if code == 1:
        assert "cannot write a record" in process.stderr
    (file,) = (tmp_path / "records").glob("*.json")
    assert json.loads(file.read_text())["metrics"] == {"top1": 1.0}
    cell = Cell.create(task="classification", model="bundled_vit", data="bundled", method="base_ptq")
    ResultStore(tmp_path).put(cell, {"config": cell.config, "provenance": {}, "metrics": {"top1": 2.0}})
    assert [path.suffix for path in (tmp_path / "records").iterdir()] == [".json"]
    assert json.loads(file.read_text())["metrics"] == {"top1": 2.0}
