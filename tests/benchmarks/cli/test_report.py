"""``adfq report``: what it writes from a store, its exit codes, one line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cell import Cell
from benchmarks.cli.main import main
from benchmarks.plan import Selection, make_plan
from benchmarks.run.records import SCHEMA
from benchmarks.run.store import ResultStore

pytestmark = pytest.mark.usefixtures("methods_read_once")

FILES = ["index.html", "report.md", "report.tex"]
PART = [
    *("report", "1", "4", "--models", "bundled_vit", "--methods", "base_ptq", "--bits", "W4A4"),
    *("--limit", "20", "--calibration-size", "4"),
]


def write_records(
    folder: Path, names: Sequence[str] = (), but: Callable[[Cell], bool] = lambda cell: False, **selection: Any
) -> list[Cell]:
    """Write a record for each cell of tables but some; return the cells."""
    cells = make_plan(names, Selection(**selection), check_files=False).cells
    (folder / "records").mkdir(parents=True)
    metrics = dict.fromkeys(("top1", "box_ap", "mask_ap", "mean_iou"), 50.0) | {"images": 3}
    for cell in cells:
        if not but(cell):
            record = {"schema": SCHEMA, "config": cell.config, "provenance": {}, "metrics": metrics}
            record["finished"] = "2026-11-23T10:00:00+00:00"
            (folder / "records" / f"{cell.id}.json").write_text(json.dumps(record))
    return cells


def test_tables_become_a_page_markdown_and_latex(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], assert_refused: Callable[[Sequence[str], str], None]
) -> None:
    store, out = tmp_path / "runs", tmp_path / "new" / "pages"
    command = [*PART, "--store", str(store), "--out", str(out)]
    assert_refused(command, f"there are no records in {store}")
    assert not store.exists()  # nothing is measured, nor made, without being asked for
    assert main([*command, "--measure", "--jobs", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / file) for file in FILES]
    texts = [(out / file).read_text() for file in FILES]
    for text in texts:
        assert "Component ablation" in text
        assert text.count("--calibration-size 4 --limit 20") == 2
        assert "no record" not in text
    assert "2 cells" in texts[0]  # both tables have the same
    times = {path: path.stat().st_mtime_ns for path in (store / "records").iterdir()}
    assert len(times) == 2

    assert main(command) == 0  # from the records
    assert [(out / file).read_text() for file in FILES] == texts
    assert {path: path.stat().st_mtime_ns for path in times} == times

    (out / FILES[0]).unlink()
    (out / FILES[0]).mkdir()
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err == f"adfq: error: cannot write {out / FILES[0]}: Is a directory\n"


def test_a_missing_record_is_an_empty_cell_and_a_note(tmp_path: Path) -> None:
    cells = write_records(tmp_path, ["1"], lambda cell: cell.method == "repq_vit" and cell.bits == "W4/A4")
    assert main(["report", "1", "--store", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert f"2 of {len(cells)} cells have no record" in page
    markdown = (tmp_path / "report.md").read_text()
    assert f"2 of {len(cells)} cells have no record." in markdown
    (row,) = (line for line in markdown.splitlines() if line.startswith("| RepQ-ViT") and "W4/A4" in line)
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["", ""]
    assert not (tmp_path / "failures").exists()  # a store that is read stays as it is


def test_a_failed_cell_has_its_exit_code(tmp_path: Path) -> None:
    cells = write_records(tmp_path, ["3"], lambda cell: cell.method == "ptq4vit")
    assert main(["report", "3", "--store", str(tmp_path)]) == 0
    store = ResultStore(tmp_path)
    store.put_failure(next(cell for cell in cells if cell.method == "ptq4vit"), {"error": "out of memory"})
    assert main(["report", "3", "--store", str(tmp_path)]) == 1
    assert f"1 of {len(cells)} cells failed" in (tmp_path / "index.html").read_text()


def test_without_names_all_tables_that_have_the_profile(tmp_path: Path) -> None:
    write_records(tmp_path / "bundled")
    assert main(["report", "--store", str(tmp_path / "bundled")]) == 0
    page = (tmp_path / "bundled" / "index.html").read_text()
    assert [f"Table {name}. " in page for name in "12345"] == [True] * 5

    write_records(tmp_path / "mobile", profile="mobile", data="coco")
    options = ["--profile", "mobile", "--data", "coco"]  # the data may be elsewhere
    assert main(["report", *options, "--store", str(tmp_path / "mobile")]) == 0
    page = (tmp_path / "mobile" / "index.html").read_text()
    assert [f"Table {name}. " in page for name in "12345"] == [False, False, True, False, False]


def test_the_newest_record_counts_and_other_code_is_said(tmp_path: Path) -> None:
    cells = write_records(tmp_path, ["1"], models=["bundled_vit"])
    repq = [cell for cell in cells if cell.method == "repq_vit"]
    for number, cell in enumerate(repq):
        file = tmp_path / "records" / f"{cell.id}.json"
        record = json.loads(file.read_text())
        newer = {"code": "new" if number else "old"}
        record |= {"provenance": newer, "environment": {"commit": f"{number}" * 40}, "finished": "2026-12-01"}
        record["metrics"]["top1"] = 61.5
        (tmp_path / "records" / f"{cell.id}-newer.json").write_text(json.dumps(record))
    assert main(["report", "1", "--models", "bundled_vit", "--store", str(tmp_path)]) == 0
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.count("61.50 (+11.50)") == len(repq)
    assert "Not all measured with the same code (commits 00000000, 11111111, 22222222): RepQ-ViT of bundled_vit." in (
        markdown
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "9"], "unknown table '9'; there are 1"),
        (["report", "--profile", "huge"], "no table has a profile 'huge'; there are bundled, full, mobile"),
        (["report", "--profile", "full"], "needs --data"),
        (["report", "--profile", "full", "--data", "x"], "tables of different tasks need different data"),
        (["report"], "there are no records in runs"),
        (["report", "--jobs", "2"], "nothing is measured without --measure: add it, or leave --jobs out"),
        ([*PART, "--measure", "--store", "file"], "cannot write to file: "),
        ([*PART, "--measure", "--store", "file/folder"], "cannot write to file/folder: "),
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
    table = ["report", "5", "--methods", "adfq_vit", "--limit", "4", "--calibration-size", "2"]
    command = [*table, "--measure", "--jobs", "0", "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert_refused([*command, "--figures", str(tmp_path / "none.png")], "there is no figure")
    assert_refused([*command, "--figures", __file__], "there is no figure")
    assert main([*command, "--figures", str(picture)]) == 0
    drawn = [f"table5-bundled-{kind}.png" for kind in ("reconstruction", "accuracy-cost")]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert all(name in markdown for name in (*drawn, "masks.svg"))
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/") == 3


def test_the_page_opens_with_accuracy_over_bit_widths(tmp_path: Path) -> None:
    write_records(tmp_path, ["1", "4"])
    assert main(["report", "1", "4", "--store", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    text = "Accuracy of each method over bit-widths: Bundled ViT, Bundled Swin."
    assert page.index(text) < page.index("<table")
    assert page.count(text) == 2  # the alternative text and the caption
    assert (tmp_path / "accuracy-bits.png").is_file()
