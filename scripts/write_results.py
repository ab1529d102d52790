"""Writer of docs/results.md and docs/accuracy.png from the committed records: python scripts/write_results.py.

Every number in a table of the page comes from a record. The prose between the tables is scripts/results.md.jinja.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import jinja2

from adfq.errors import AdfqError
from benchmarks.plan import RECORDED, Selection, make_plan
from benchmarks.report.figures import style
from benchmarks.report.figures.accuracy_bits import Panel, collect_panels, plot_accuracy_bits
from benchmarks.report.tables import summarize
from benchmarks.run.plans import TableResults, read_plan, read_records

ROOT = Path(__file__).resolve().parents[1]
STORE = ROOT / "results" / "bundled"
PROFILE = "bundled"


def write_page() -> str:
    """Return the text of docs/results.md."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template("results.md.jinja").render(table=_render_table, machine=_describe_machine())


def _render_table(name: str) -> str:
    """Return a table with its caption and notes as Markdown, below a heading of its own."""
    (results,) = _read([name])
    _, _, rest = results.render().partition("\n\n")
    return f"## {results.table.heading}\n\n{rest}"


def collect_picture() -> list[Panel]:
    """Return the panels of docs/accuracy.png: the models of tables 1 to 3."""
    return collect_panels((each.table, summarize(each.table, each.to_frame())) for each in _read(["1", "2", "3"]))


def digest_picture(panels: list[Panel]) -> str:
    """Return a digest of every number in a picture, which the picture carries as its description."""
    columns = ["label", "bits", "mean", "std"]
    text = "".join(panel.title + panel.rows[columns].to_csv(index=False, float_format="%.4f") for panel in panels)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(names: list[str]) -> list[TableResults]:
    """Return tables with all recorded seeds; AdfqError where a cell has no record."""
    tables = read_plan(make_plan(names, Selection(PROFILE, seeds=RECORDED), check_files=False), STORE)
    for results in tables:
        if results.count("measured") < len(results.results):
            raise AdfqError(f"{STORE} has no record of some cells of table {results.table.name}")
    return tables


def _describe_machine() -> str:
    """Return a sentence on the hardware and versions that the records name."""
    records = read_records(STORE)
    keys = ("processor", "cores", "python", "torch", "timm")
    processor, cores, python, torch, timm = (
        " or ".join(sorted({str(record["environment"][key]) for record in records})) for key in keys
    )
    return (
        f"They were measured on {cores} cores of an {processor}, with Python {python}, torch {torch} and timm {timm}."
    )


def main() -> None:
    """Write the page and its picture."""
    (ROOT / "docs" / "results.md").write_text(write_page(), encoding="utf-8")
    panels = collect_picture()
    metadata = {"Description": digest_picture(panels)}
    style.save(plot_accuracy_bits(panels), ROOT / "docs" / "accuracy.png", metadata=metadata)


if __name__ == "__main__":
    main()
