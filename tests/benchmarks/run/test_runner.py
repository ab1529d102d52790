"""A record says all that a measurement depends on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.run import runner
from benchmarks.run.console import collect_warnings, warn

CPU = torch.device("cpu")


def test_a_record_says_what_was_measured_with_what(subject: Any, cells: list[Cell]) -> None:
    record = runner.run_cell(cells[1], subject, CPU)
    assert record["config"] == cells[1].config
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["memory_gb"] > 0.1
    assert record["provenance"] == runner.provenance(cells[1], subject)
    assert record["provenance"]["data"] == subject.data_digests
    assert set(record["timing"]) == {"calibration", "evaluation", "loading"}
    assert record["cost"]["calibration_seconds"] == record["timing"]["calibration"] > 0
    assert record["cost"]["forward_seconds"] > 0
    assert "outliers" not in record["cost"]  # of per-patch quantizers alone


def test_the_commit_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def commit() -> Any:
        runner._commit.cache_clear()
        return runner._commit()

    (tmp_path / "adfq").mkdir()
    file = tmp_path / "adfq" / "__init__.py"
    file.touch()
    monkeypatch.setattr(runner.adfq, "__file__", str(file))
    assert commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    first = commit()
    assert len(first) == 40
    file.write_text("changed = True")
    assert commit() == f"{first}-dirty"
    monkeypatch.setattr(runner.adfq, "__file__", str(tmp_path / "adfq" / "site" / "adfq" / "__init__.py"))
    (tmp_path / "adfq" / "site").mkdir()
    assert commit() is None  # installed within somebody's repository
    runner._commit.cache_clear()


def test_a_method_of_somebody_elses_counts_by_its_source(
    subject: Any, cells: list[Cell], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "method" not in runner.provenance(cells[1], subject)
    (tmp_path / "their_method.py").write_text("def method(network, bits, images, seed): ...")
    monkeypatch.syspath_prepend(tmp_path)
    import their_method

    monkeypatch.setattr(runner, "find_method", lambda name: their_method.method)

    def digest() -> str:
        runner._foreign_method.cache_clear()
        return str(runner.provenance(cells[1], subject)["method"])

    first = digest()
    assert digest() == first
    (tmp_path / "their_method.py").write_text("def method(network, bits, images, seed): 1 / 0")
    assert digest() != first
    runner._foreign_method.cache_clear()
    del sys.modules["their_method"]


def test_unknown_devices_are_one_clear_line() -> None:
    with pytest.raises(AdfqError, match="cannot use device 'abacus'"):
        runner.resolve_device("abacus")
    assert runner.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_clear_line() -> None:
    with pytest.raises(AdfqError, match="cannot use device 'cuda'"):
        runner.resolve_device("cuda")


def test_warnings_are_collected_once_and_only_within(capsys: pytest.CaptureFixture[str]) -> None:
    warn("before")
    with collect_warnings() as messages:
        warn("this")
        warn("this")
    warn("after")
    assert messages == ["this"]
    assert capsys.readouterr().err.count("this") == 2
