"""``adfq report``: what it writes, its exit codes, one line for each mistake."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import report
from benchmarks.cli.main import main
from benchmarks.cli.options import table_entries
from benchmarks.plan import load_table

pytestmark = pytest.mark.usefixtures("methods_read_once")

FILES = ["index.html", "report.md", "report.tex"]
PART = [
    *("report", "1", "4", "--models", "bundled_vit", "--methods", "base_ptq", "--bits", "W4A4"),
    *("--seeds", "0", "--limit", "20", "--calibration-size", "4", "--jobs", "0"),
]


def test_tables_become_a_page_markdown_and_latex(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*PART, "--out", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / file) for file in FILES]
    texts = [(tmp_path / file).read_text() for file in FILES]
    for text in texts:
        assert "Component ablation" in text
        assert text.count("--calibration-size 4 --limit 20") == 2
    assert "2 cells" in texts[0]  # both tables have the same
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    assert len(times) == 2

    assert main(command) == 0  # from the records
    assert [(tmp_path / file).read_text() for file in FILES] == texts
    assert {path: path.stat().st_mtime_ns for path in times} == times

    for file in FILES:
        (tmp_path / file).unlink()
    (tmp_path / FILES[0]).mkdir()
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err == f"adfq: error: cannot write {tmp_path / FILES[0]}: Is a directory\n"


@pytest.mark.parametrize("failed", [False, True])
def test_failed_cells_have_their_exit_code(failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(names: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
        asked.extend(names)
        for name in names:
            table = replace(load_table(name, options.profile), seeds=[0])
            metrics = {**dict.fromkeys(table.metrics, 50.0), "images": 3}
            record = {"metrics": metrics, "environment": {}, "finished": "2026-11-23T10:00:00+00:00"}
            entries = table_entries(table, options)
            records = [None if failed and name == "3" else record, *[record] * (len(entries) - 1)]
            yield table, list(zip(entries, records, strict=True))

    monkeypatch.setattr(report, "measure_tables", measure)
    assert main(["report", "--out", str(tmp_path)]) == failed
    assert asked == ["1", "2", "3", "4", "5"]  # all that have the profile
    assert ("1 of " in (tmp_path / "index.html").read_text()) == failed

    asked.clear()
    assert main(["report", "--profile", "mobile", "--data", "x", "--out", str(tmp_path)]) == failed
    assert asked == ["3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "9"], "unknown table '9'; there are 1"),
        (["report", "--profile", "huge"], "no table has a profile 'huge'; there are bundled, full, mobile"),
        (["report", "--profile", "full"], "needs --data"),
        (["report", "--profile", "full", "--data", "x"], "tables of different tasks need different data"),
        ([*PART, "--out", "file"], "cannot write results to file: "),
        ([*PART, "--out", "file/folder"], "cannot write results to file/folder: "),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    assert_refused: Callable[[Sequence[str], str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert_refused(arguments, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_figures_come_from_records_and_from_files(tmp_path: Path, assert_refused: Any) -> None:
    picture = tmp_path / "masks.svg"
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    table = ["report", "5", "--methods", "adfq_vit", "--seeds", "0", "--limit", "4", "--calibration-size", "2"]
    command = [*table, "--jobs", "0", "--out", str(tmp_path / "runs")]
    assert_refused([*command, "--figures", str(tmp_path / "none.png")], "there is no figure")
    assert_refused([*command, "--figures", __file__], "there is no figure")
    assert main([*command, "--figures", str(picture)]) == 0
    drawn = [f"table5-bundled-{kind}.png" for kind in ("reconstruction", "accuracy-cost")]
    assert all((tmp_path / "runs" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    markdown = (tmp_path / "runs" / "report.md").read_text()
    assert all(name in markdown for name in (*drawn, "masks.svg"))
    assert (tmp_path / "runs" / "index.html").read_text().count("data:image/") == 3
