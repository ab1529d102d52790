"""A report says what was measured, where, and how to measure it again; its page needs nothing else."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adfq import AdfqError
from benchmarks.cell import Cell
from benchmarks.plan import Entry, Table, load_table
from benchmarks.report.page import Figure, Report, render_report
from benchmarks.report.tables import render, tabulate_results
from benchmarks.run.correct import pack_correct
from benchmarks.run.store import Record

pytestmark = pytest.mark.usefixtures("methods_read_once")

Results = list[tuple[Entry, "Record | None"]]
Values = dict[tuple[str, str], Any]

# Elements without an end.
VOID = {"br", "img", "link", "meta"}


class Page(HTMLParser):
    """Reads a page: its elements, and the text of each table's cells. Refuses elements that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.styles = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "table" in self.open and {"td", "th"} & set(self.open):
            cell = self.tables[-1][-1]
            cell[-1] = " ".join(f"{cell[-1]} {data}".split())
        if "style" in self.open:
            self.styles += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def measure(table: Table, values: Values, environment: dict[str, Any] | None = None) -> Results:
    """Results as if measured: by model's and row's key, a value, or one for each seed; None has failed."""
    results: Results = []
    for entry in table.entries(data="somewhere"):
        value = values.get((entry.model.key, entry.row.key), 50.0)
        value = value[list(table.seeds).index(entry.cell.seed)] if isinstance(value, list) else value
        record = {
            "config": entry.cell.config,
            "metrics": {**dict.fromkeys(table.metrics, value), "images": 123},
            "cost": {"calibration_seconds": 2.25, "forward_seconds": 3.0, "size": 1.5},
            "environment": environment or {"torch": "2.14.1", "threads": 2},
            "finished": "2026-11-23T10:00:00+00:00",
        }
        results.append((entry, None if value is None else record))
    return results


def command(cell: Cell) -> str:
    return f"measure {cell.id} | 'so'"


def write(measured: Sequence[tuple[Table, Results]], figures: Sequence[Figure] = ()) -> dict[str, str]:
    return render_report(Report.create(measured, command), Path("out"), figures)


@pytest.fixture
def bundled() -> Table:
    table = load_table("1", "bundled")
    return replace(table, bits=["W4/A4"], models=table.models[:1], seeds=table.recorded_seeds)


@pytest.fixture
def full() -> Table:
    table = load_table("1", "full")
    return replace(table, bits=["W4/A4"], models=[m for m in table.models if m.key in ("vit_small", "deit_tiny")])


@pytest.fixture
def figure(tmp_path: Path) -> Figure:
    file = tmp_path / "a figure.png"
    Image.new("RGB", (3, 2)).save(file)
    return Figure("Cost & accuracy", 'What "50 %" costs', file)


def test_the_page_has_all_tables_and_needs_nothing_else(figure: Figure) -> None:
    tables = [load_table(name, "bundled") for name in "12345"]
    texts = write([(table, measure(table, {})) for table in tables], [figure])
    assert list(texts) == ["index.html", "report.md", "report.tex"]
    page = Page(texts["index.html"])
    assert len(page.tables) == 5
    for table, rows in zip(tables, page.tables, strict=True):
        assert f"Table {table.name}. {table.title}" in texts["index.html"]
        assert len(rows) == 2 + len(table.rows) * len(table.bits)
        assert {len(row) for row in rows} == {2 + len(table.models) * len(table.metrics) + (5 if table.cost else 0)}
    ids = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            address = attributes.get(name) or "data:"
            assert address.startswith("data:") or (address[0] == "#" and address[1:] in ids)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert page.find("script") == [{}]
    policy = next(meta["content"] for meta in page.find("meta") if meta.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")


def test_every_heading_is_a_button_that_sorts_numbers(bundled: Table) -> None:
    page = Page(write([(bundled, measure(bundled, {("bundled_vit", "base_ptq"): [40.5] * 3}))])["index.html"])
    headings = [attributes for attributes in page.find("th") if attributes["scope"] == "col"]
    assert [heading["aria-sort"] for heading in headings] == ["none"] * 3
    assert len(page.find("button")) == 3
    values = [cell["data-value"] for cell in page.find("td")]
    assert values == ["3232", "50.0", "404", "40.5", *["404", "50.0"] * 3]


def test_differences_to_full_precision_and_spread_stand_in_cells(bundled: Table) -> None:
    values: Values = {("bundled_vit", "full_precision"): 91.0, ("bundled_vit", "base_ptq"): [40.0, 42.0, 44.0]}
    texts = write([(bundled, measure(bundled, values))])
    _, full, base, *_ = Page(texts["index.html"]).tables[0]
    assert full == ["Full precision W32/A32", "W32/A32", "91.00"]
    assert base == ["Base PTQ W4/A4", "W4/A4", "42.00 ± 2.00 −49.00"]
    assert "Mean ± standard deviation over seeds 0, 1, 2" in texts["index.html"]
    assert "measured on <time>2026-11-23</time>" in texts["index.html"]


def test_published_numbers_stand_beside_ours(full: Table) -> None:
    values: Values = {
        ("vit_small", "full_precision"): 81.39,
        ("deit_tiny", "full_precision"): 72.0,
        ("vit_small", "repq_vit"): 64.0,
    }
    texts = write([(full, measure(full, values))])
    rows = {row[0].split(" W")[0]: row[2:] for row in Page(texts["index.html"]).tables[0]}
    assert rows["Full precision"] == ["81.39 81.39 (+0.00)", "72.00 72.21 (−0.21)"]
    assert rows["RepQ-ViT"] == ["64.00 65.05 (−1.05)", "50.00‡ 57.43 (−7.43)"]
    assert rows["ADFQ-ViT"][0] == "50.00 72.14† (−22.14)"
    assert rows["Base PTQ"][0] == "50.00"  # nothing is published
    for mark in ("† Quoted second hand", "‡ Does not count"):
        assert mark in texts["index.html"]


@pytest.mark.parametrize(("values", "best"), [([70.0, 71.0, 72.0], True), ([48.0, 51.0, 54.0], False)])
def test_the_best_is_marked_where_it_is_ahead_by_more_than_the_spread(
    bundled: Table, values: list[float], best: bool
) -> None:
    text = write([(bundled, measure(bundled, {("bundled_vit", "repq_vit"): values}))])["index.html"]
    page = Page(text)
    assert [attributes.get("class") for attributes in page.find("td")].count("best") == best
    row = next(row for row in page.tables[0] if row[0].startswith("RepQ-ViT"))
    assert row[2].endswith("(best) +21.00") == best


def test_the_interval_of_the_difference_to_the_best_stands_in_cells(bundled: Table) -> None:
    results = measure(bundled, {("bundled_vit", "repq_vit"): [70.0, 71.0, 72.0]})
    for _, record in results:
        assert record is not None
        record["metrics"]["images"] = 200
        record["correct"] = pack_correct({"top1": np.arange(200) < 2 * record["metrics"]["top1"]})
    text = write([(bundled, results)])["index.html"]
    rows = {row[0]: row[2] for row in Page(text).tables[0]}
    assert rows["RepQ-ViT W4/A4"] == "71.00 ± 1.00 (best) +21.00"
    low, high = re.fullmatch(r"50\.00 ± 0\.00 \+0\.00 \[−(.*), −(.*)\]", rows["Base PTQ W4/A4"]).groups()  # type: ignore[union-attr]
    assert 24 < float(low) < 28
    assert 14 < float(high) < 18
    assert "in brackets the 95 % interval of the difference to the best mean" in text


def test_training_stands_in_columns(bundled: Table) -> None:
    table = replace(bundled, training=True)
    rows = Page(write([(table, measure(table, {}))])["index.html"]).tables[0]
    assert rows[0] == ["Method", "W/A", "Trained", "Images", "Iterations", "Bundled ViT"]
    assert [row[2:5] for row in rows[-2:]] == [["nothing", "32", "–"], ["roundings, step sizes", "128", "50"]]


def test_failed_cells_are_said(bundled: Table) -> None:
    values: Values = {("bundled_vit", "repq_vit"): [40.0, None, 42.0], ("bundled_vit", "ptq4vit"): [None] * 3}
    report = Report.create([(bundled, measure(bundled, values))], command)
    assert (report.cells, report.failed) == (13, 4)
    texts = render_report(report, Path("out"))
    rows = {row[0]: row[2] for row in Page(texts["index.html"]).tables[0]}
    assert rows["PTQ4ViT W4/A4"] == "failed"
    assert rows["RepQ-ViT W4/A4"] == "41.00 ± 1.41 −9.00"
    assert "4 of 13 cells failed" in texts["index.html"]
    for text in texts.values():
        assert re.search(r"RepQ-ViT W4/A4 of bundled\\?_vit, seed 1", text)
    assert "# Bundled ViT, RepQ-ViT, W4/A4, seed 1: failed\n" in texts["report.md"]


def test_a_report_of_nothing_but_failures(bundled: Table) -> None:
    results: Results = [(entry, None) for entry, _ in measure(bundled, {})]
    texts = write([(bundled, results)])
    assert "No cell has been measured" in texts["index.html"]
    assert {row[2] for row in Page(texts["index.html"]).tables[0][1:]} == {"failed"}


def test_text_stays_text(bundled: Table) -> None:
    label = "<b>ViT</b> & <script>x</script>"
    table = replace(bundled, models=[replace(bundled.models[0], label=label)], caption="<i>caption</i>")
    results = measure(table, {}, {"device": '<img src="http://somewhere">'})
    page = Page(write([(table, results)])["index.html"])
    assert page.tables[0][0][2] == label
    assert not page.find("b")
    assert not page.find("i")
    assert not page.find("img")
    assert len(page.find("script")) == 1


def test_every_cell_has_its_command(bundled: Table) -> None:
    results = measure(bundled, {})
    texts = write([(bundled, results)])
    for entry, _ in results:
        assert f"<code>measure {entry.cell.id} | &#39;so&#39;</code>" in texts["index.html"]
        assert f"\nmeasure {entry.cell.id} | 'so'\n" in texts["report.md"]
        assert f"measure {entry.cell.id} \\textbar{{}} 'so'" in texts["report.tex"]


def test_markdown_and_latex_have_the_tables_as_adfq_table_prints_them(bundled: Table, full: Table) -> None:
    tables = [bundled, replace(load_table("2", "bundled"), bits=["W4/A4"]), full]
    measured = [(table, measure(table, {})) for table in tables]
    texts = write(measured)
    for table, results in measured:
        frame = tabulate_results(table, results)
        assert render(table, frame, "md") in texts["report.md"]
        assert render(table, frame, "latex") in texts["report.tex"]


def test_environments_that_differ_are_listed(bundled: Table) -> None:
    results = measure(bundled, {})
    for name, value in (("threads", 1), ("mmdet", None)):
        entry, record = results[4]
        assert record is not None
        results[4] = entry, {**record, "environment": {**record["environment"], name: value}}
    # The same cells in another table count once, and are named after the first one.
    report = Report.create([(bundled, results), (replace(bundled, name="5"), results)], command)
    odd = "table 1: Bundled ViT, PTQ4ViT, W4/A4, seed 0"
    settings = {setting.name: setting.values for setting in report.environment}
    assert [value for value, _ in settings["torch"]] == ["2.14.1"]
    assert [(value, len(cells)) for value, cells in settings["threads"]] == [("2", 12), ("1", 1)]
    assert settings["threads"][1][1] == [odd]
    assert [value for value, _ in settings["mmdet"]] == ["none"]
    texts = render_report(report, Path("out"))
    assert f"<li>{odd}</li>" in texts["index.html"]
    assert f"| threads | 2 (all other cells) |\n|  | 1 ({odd}) |\n" in texts["report.md"]


def test_many_cells_of_an_environment_are_counted(bundled: Table) -> None:
    results = measure(bundled, {})
    for index, (entry, record) in enumerate(results[:4]):
        assert record is not None
        results[index] = entry, {**record, "environment": {**record["environment"], "threads": 1}}
    texts = render_report(Report.create([(bundled, results)], command), Path("out"))
    assert "| threads | 2 (all other cells) |\n|  | 1 (4 cells) |\n" in texts["report.md"]
    assert "threads: 1 (4 cells)" in texts["report.tex"]


def test_figures_are_in_the_page_and_linked_from_the_others(bundled: Table, figure: Figure, tmp_path: Path) -> None:
    report = Report.create([(bundled, measure(bundled, {}))], command)
    texts = render_report(report, tmp_path / "out", [figure])
    image = Page(texts["index.html"]).find("img")[0]
    assert image["alt"] == figure.text
    source = str(image["src"])
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == figure.file.read_bytes()
    assert "](../a%20figure.png)" in texts["report.md"]
    assert "{../a figure.png}" in texts["report.tex"]
    assert r"\textbf{Cost \& accuracy.}" in texts["report.tex"]


def test_latex_takes_what_lies_beside_an_svg(bundled: Table, figure: Figure, tmp_path: Path) -> None:
    vector = tmp_path / "vector.svg"
    vector.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    measured = [(bundled, measure(bundled, {}))]
    texts = write(measured, [figure._replace(file=vector)])
    assert "data:image/svg+xml;base64," in texts["index.html"]
    assert r"\includegraphics" not in texts["report.tex"]
    shutil.copy(figure.file, tmp_path / "vector.png")
    assert "vector.png}" in write(measured, [figure._replace(file=vector)])["report.tex"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.png", "cannot read .*none.png: No such file"), ("x.gif", "x.gif is neither PNG nor SVG")],
)
def test_figures_that_cannot_be_shown(bundled: Table, name: str, message: str) -> None:
    with pytest.raises(AdfqError, match=message):
        write([(bundled, measure(bundled, {}))], [Figure("", "", Path(name))])


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_compiles(full: Table, figure: Figure, tmp_path: Path) -> None:
    odd = replace(load_table("4", "bundled"), title=r"50% of \nothing {x}_^~ $ # <|>", seeds=[0])
    wide = load_table("2", "full")
    measured = [
        (full, measure(full, {("vit_small", "repq_vit"): None})),
        (odd, measure(odd, {})),
        (wide, measure(wide, {})),
    ]
    texts = render_report(Report.create(measured, command), tmp_path, [figure])
    (tmp_path / "report.tex").write_text(texts["report.tex"])
    ran = _compile(tmp_path)
    assert ran.returncode == 0, ran.stdout
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert "Overfull" not in ran.stdout


def _compile(directory: Path) -> subprocess.CompletedProcess[str]:
    options = ["-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    return subprocess.run(["pdflatex", *options], cwd=directory, capture_output=True, text=True, errors="replace")
