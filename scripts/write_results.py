"""Writer of docs/results.md and docs/accuracy.png from the committed records: python scripts/write_results.py.

Every number in a table of the page comes from a record. The prose between the tables is scripts/results.md.jinja.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

from adfq.errors import AdfqError
from benchmarks.plan import RECORDED, Selection, make_plan
from benchmarks.run.plans import read_plan, read_records

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
    plan = make_plan([name], Selection(PROFILE, seeds=RECORDED), check_files=False)
    (results,) = read_plan(plan, STORE)
    if results.count("measured") < len(results.results):
        raise AdfqError(f"{STORE} has no record of some cells of table {name}")
    _, _, rest = results.render().partition("\n\n")
    return f"## {results.table.heading}\n\n{rest}"


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
    """Write the page."""
    (ROOT / "docs" / "results.md").write_text(write_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
