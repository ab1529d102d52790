"""A record says which code, weights and data it was measured with, and which code counts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cell import Cell
from benchmarks.run import provenance, sources


def fresh_digest(cell: Cell, model: Any) -> str:
    for function in (sources.digest_sources, sources.find_source, sources._read):
        function.cache_clear()
    return provenance.code_digest(cell, model)


def test_the_commit_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def commit() -> Any:
        provenance._commit.cache_clear()
        return provenance._commit()

    (tmp_path / "adfq").mkdir()
    file = tmp_path / "adfq" / "__init__.py"
    file.touch()
    monkeypatch.setattr(provenance.adfq, "__file__", str(file))
    assert commit() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    first = commit()
    assert len(first) == 40
    file.write_text("changed = True")
    assert commit() == f"{first}-dirty"
    monkeypatch.setattr(provenance.adfq, "__file__", str(tmp_path / "adfq" / "site" / "adfq" / "__init__.py"))
    (tmp_path / "adfq" / "site").mkdir()
    assert commit() is None  # installed within somebody's repository
    provenance._commit.cache_clear()


def test_a_method_of_somebody_elses_counts_by_its_source(
    subject: Any, cells: list[Cell], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "their_method.py").write_text("def method(network, bits, images, seed): ...")
    monkeypatch.syspath_prepend(tmp_path)
    their_method = importlib.import_module("their_method")
    own = fresh_digest(cells[1], subject.model)
    monkeypatch.setattr(provenance, "find_method", lambda name: their_method.method)
    first = fresh_digest(cells[1], subject.model)
    assert first != own
    assert fresh_digest(cells[1], subject.model) == first
    (tmp_path / "their_method.py").write_text("def method(network, bits, images, seed): 1 / 0")
    assert fresh_digest(cells[1], subject.model) != first
    del sys.modules["their_method"]


def test_the_code_of_a_cell_is_that_of_its_method_adapter_and_task(
    make_vit: Any, make_swin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[str, ...]] = []
    monkeypatch.setattr(provenance, "digest_sources", lambda roots: chosen.append(roots) or "digest")
    fields = {"model": "any", "data": "any"}
    for cell, model in (
        (Cell.create(task="classification", method="base_ptq", **fields), make_vit()),
        (Cell.create(task="classification", method="repq_vit", **fields), make_swin()),
        (Cell.create(task="segmentation", method="full_precision", **fields), make_vit()),
    ):
        assert provenance.code_digest(cell, model) == "digest"
    runner, classification = "benchmarks.run.measuring", "benchmarks.tasks.classification"
    assert chosen == [
        (runner, classification, "baselines.base_ptq", "adfq.adapters.timm_vit"),
        (runner, classification, "baselines.repq_vit", "adfq.adapters.timm_swin"),
        (runner, "benchmarks.tasks.segmentation"),
    ]
