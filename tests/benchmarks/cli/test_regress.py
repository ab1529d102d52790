"""``adfq regress`` from end to end: what it prints and writes, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from junitparser import Failure, JUnitXml

from benchmarks.cell import Cell
from benchmarks.cli.main import main

PART = [
    *("--models", "bundled_vit", "--methods", "base_ptq", "--bits", "W4A4", "--seeds", "0"),
    *("--limit", "20", "--calibration-size", "4", "--jobs", "0"),
]
# Twice the same computation never takes the same time.
TOLERANCE = ["--tolerance", "time=1000x"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two records, of full precision and of base PTQ."""
    folder = tmp_path_factory.mktemp("measured")
    assert main(["table", "1", *PART, "--store", str(folder)]) == 0
    return folder


@pytest.fixture
def reference(measured: Path, tmp_path: Path) -> Path:
    """A copy of them to compare with."""
    return Path(shutil.copytree(measured, tmp_path / "results"))


def records_of(folder: Path, method: str) -> list[Path]:
    files = (folder / "records").glob("*.json")
    return [path for path in files if json.loads(path.read_text())["config"]["method"] == method]


def change(path: Path, points: float) -> None:
    record = json.loads(path.read_text())
    record["metrics"]["top1"] += points
    record.pop("correct", None)  # bits that do not give the metric make a damaged record
    path.write_text(json.dumps(record))


def test_nothing_has_moved_and_then_a_metric_has(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, junit = tmp_path / "summary.md", tmp_path / "new" / "junit.xml"
    summary.write_text("Before.\n")
    command = ["regress", "1", *PART, *TOLERANCE, "--against", str(reference), "--store", str(tmp_path / "runs")]
    command += ["--summary", str(summary), "--junit", str(junit)]
    capsys.readouterr()

    assert main(command) == 0
    assert capsys.readouterr().out == ("2 cells, 0 moved, 0 regressions (tolerance: accuracy 0.3 points, time ×1000)\n")
    (suite,) = JUnitXml.fromfile(str(junit))
    assert [case.is_passed for case in suite] == [True, True]

    (path,) = records_of(reference, "base_ptq")
    change(path, 5.0)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "records").iterdir()}
    assert main(command) == 1
    assert {path: path.stat().st_mtime_ns for path in times} == times  # what has been measured counts
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("2 cells, 1 moved, 1 regression (")
    assert [cell.strip() for cell in out.splitlines()[2].split("|")[1:6]] == [
        *("Bundled ViT", "Base PTQ", "W4/A4", "0", "top1")
    ]
    assert "-5.00" in out.splitlines()[2]
    assert out in summary.read_text()
    assert summary.read_text().startswith("Before.\n")
    (suite,) = JUnitXml.fromfile(str(junit))
    assert suite.failures == 1
    (failure,) = [result for case in suite for result in case.result]
    assert isinstance(failure, Failure)
    assert "-5.00" in failure.message

    assert main([*command, "--tolerance", "accuracy=5,time=1000x"]) == 0

    change(path, -10.0)
    assert main(command) == 0
    assert "better" in capsys.readouterr().out


def test_a_damaged_record_is_said_and_its_cell_is_new(
    reference: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = records_of(reference, "base_ptq")
    path.write_text(path.read_text()[:100])
    command = ["regress", "1", *PART, "--against", str(reference)]
    command += ["--store", str(shutil.copytree(measured, tmp_path / "runs"))]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert f"the record {path} is damaged" in captured.err
    assert "2 cells, 0 moved, 0 regressions, 1 new" in captured.out
    assert path.exists()


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"config": {}}', '{"config": 1, "metrics": {}}'),
        '{"config": {}, "metrics": {}, "cost": [1]}',
        '{"config": {}, "metrics": {}, "provenance": null}',
    ],
)
def test_a_folder_of_damaged_records_alone_has_none(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.json").write_text(content)
    assert main(["regress", "1", *PART, "--against", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("adfq: error: there are no records in")


def write_record(folder: Path) -> None:
    cell = Cell.create(task="classification", model="bundled_vit", data="elsewhere", method="full_precision")
    (folder / "records").mkdir(parents=True)
    (folder / "records" / "a.json").write_text(
        json.dumps({"config": cell.config, "provenance": {}, "metrics": {"top1": 1.0}})
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "missing"], "there are no records in missing"),
        (["--profile", "imaginary"], "no table has a profile 'imaginary'"),
        (["9"], "unknown table '9'"),
        ([], "no cell of what is to be measured has a record in results/bundled"),
        (["--tolerance", "1"], "'1' is not a tolerance such as accuracy=0.3,time=1.5x"),
        (["--tolerance", "0.3"], "'0.3' is not a tolerance"),
        (["--tolerance", "accuracy=little"], "'accuracy=little' is not a tolerance"),
        (["--tolerance", "accuracy=0.3x"], "'accuracy=0.3x' is not a tolerance"),
        (["--tolerance", "accuracy=-1"], "is not a tolerance"),
        (["--tolerance", "accuracy=nan"], "is not a tolerance"),
        (["--tolerance", "time=0.5x"], "is not a tolerance"),
        (["--tolerance", "time=inf"], "is not a tolerance"),
        (["--tolerance", "accuracy=1,accuracy=2"], "is not a tolerance"),
        (["--tolerance", "memory=2x"], "is not a tolerance"),
    ],
)
def test_mistakes_are_one_line_and_found_before_anything_is_measured(
    arguments: list[str],
    message: str,
    assert_refused: Callable[[Sequence[str], str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(Path("results/bundled"))
    assert_refused(["regress", *arguments], message)
    assert not Path("runs").exists()


@pytest.mark.parametrize("option", ["--summary", "--junit"])
def test_files_that_cannot_be_written_are_found_before_anything_is_measured(
    option: str, assert_refused: Callable[[Sequence[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(Path("results/bundled"))
    part = ["--data", "elsewhere", "--models", "bundled_vit"]
    assert_refused(["regress", "1", *part, option, "."], "cannot write .: it is a directory")
    assert_refused(["regress", "1", *part, option, "/proc/x.md"], "cannot write /proc/x.md: No such file or directory")
    Path("file").touch()
    assert_refused(["regress", "1", *part, option, "file/inside"], "cannot write to file: File exists")
    assert not Path("runs").exists()
